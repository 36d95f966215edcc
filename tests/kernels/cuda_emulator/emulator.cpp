// A block's threads as fibers: see cuda_runtime.h.

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {

Thread* running = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kWarp = 32;

struct Barrier {
  int arrived = 0;
  uint64_t passed = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // in turn: a lane may be one exchange ahead of another
  uint64_t exchanges[kWarp];
};

struct Fiber {
  Thread thread;
  ucontext_t start;
  jmp_buf at;
  bool started, finished;
  std::unique_ptr<char[]> stack;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier whole_block;
int or_of_block[2];
uint64_t progress;
jmp_buf scheduler;
const std::function<void()>* body_of_thread;

Fiber& current() { return *reinterpret_cast<Fiber*>(running); }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

void yield() {
  if (_setjmp(current().at) == 0) _longjmp(scheduler, 1);
}

void first_turn() {
  (*body_of_thread)();
  current().finished = true;
  ++progress;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  running = &fiber.thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void arrive(Barrier& barrier, int expected) {
  ++progress;
  uint64_t turn = barrier.passed;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == turn) yield();
}

void run_block(bool reversed) {
  int count = static_cast<int>(fibers.size());
  int finished = 0;
  while (finished < count) {
    uint64_t before = progress;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers[reversed ? count - 1 - i : i];
      if (fiber.finished) continue;
      resume(fiber);
      finished += fiber.finished;
    }
    if (progress == before) fail("threads wait at a barrier that others never reach");
  }
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body) {
  size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu || count == 0 || count > 1024)
    return cudaErrorInvalidValue;
  if (count % kWarp != 0) fail("a block that is not made of whole warps");
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  bool reversed = order != nullptr && std::strcmp(order, "reversed") == 0;
  body_of_thread = &body;
  blockDim = block;
  gridDim = grid;
  fibers.resize(count);
  warps.resize(count / kWarp);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        whole_block = {};
        or_of_block[0] = or_of_block[1] = 0;
        for (Warp& warp : warps) warp = {};
        for (size_t i = 0; i < count; ++i) {
          Fiber& fiber = fibers[i];
          unsigned index = static_cast<unsigned>(i);
          fiber.thread.thread = {index % block.x, index / block.x % block.y,
                                 index / (block.x * block.y)};
          fiber.thread.block = {x, y, z};
          fiber.thread.lane = static_cast<int>(i % kWarp);
          fiber.thread.warp = static_cast<int>(i / kWarp);
          fiber.started = fiber.finished = false;
          if (!fiber.stack) fiber.stack.reset(new char[kStack]);
          getcontext(&fiber.start);
          fiber.start.uc_stack.ss_sp = fiber.stack.get();
          fiber.start.uc_stack.ss_size = kStack;
          fiber.start.uc_link = nullptr;
          makecontext(&fiber.start, first_turn, 0);
        }
        run_block(reversed);
      }
  return cudaSuccess;
}

void block_barrier() { arrive(whole_block, static_cast<int>(fibers.size())); }

void warp_barrier() { arrive(warps[running->warp].barrier, kWarp); }

int block_or(int predicate) {
  int turn = static_cast<int>(whole_block.passed / 2 % 2);
  or_of_block[turn] |= predicate != 0;
  block_barrier();
  int result = or_of_block[turn];
  block_barrier();
  or_of_block[turn] = 0;
  return result;
}

const uint64_t* exchange(uint64_t value) {
  Warp& warp = warps[running->warp];
  uint64_t* values = warp.values[warp.exchanges[running->lane]++ % 2];
  values[running->lane] = value;
  warp_barrier();
  return values;
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  int group = running->lane / 4, in_group = running->lane % 4;
  float a_matrix[16][8], b_matrix[8][8];
  auto tf32 = [](uint64_t bits) {
    return emulator_bits<float>(static_cast<uint32_t>(bits) & 0xffffe000u);
  };
  for (int i = 0; i < 4; ++i) {
    const uint64_t* all = exchange(a[i]);
    for (int lane = 0; lane < kWarp; ++lane)
      a_matrix[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = tf32(all[lane]);
  }
  for (int i = 0; i < 2; ++i) {
    const uint64_t* all = exchange(b[i]);
    for (int lane = 0; lane < kWarp; ++lane) b_matrix[lane % 4 + 4 * i][lane / 4] = tf32(all[lane]);
  }
  for (int i = 0; i < 4; ++i) {
    int row = group + 8 * (i / 2), column = 2 * in_group + i % 2;
    for (int k = 0; k < 8; ++k) d[i] += a_matrix[row][k] * b_matrix[k][column];
  }
}

}  // namespace emulator
