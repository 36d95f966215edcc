// An error that GCC's sanitizer finds ends the process by a signal: pytest then says which test.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }
