// A few threads for the length of one call. Tasks are handed out as threads become free; which
// thread runs a task must not matter to its result.
#pragma once

#include <cstdint>

namespace densityrl {

class Team {
 public:
  using Function = void (*)(void* context, int task, int thread);

  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Calls function(context, task, thread) once for every task, and returns when all are done.
  void run(int tasks, Function function, void* context);

 private:
  struct State;
  int threads_;
  State* state_;
};

// Memory for std::free, aligned to a cache line and, where it is large, on huge pages where the
// system has them: points look up pixels all over it. Throws std::bad_alloc.
void* aligned_memory(std::int64_t bytes);

// Asks for huge pages under memory that is about to be written for the first time: thousands of
// page faults fewer for a gradient of the planes. Only a hint.
void prefer_huge_pages(void* memory, std::int64_t bytes);

}  // namespace densityrl
