#include "team.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace densityrl {

struct Team::State {
  std::mutex mutex;
  std::condition_variable work, done;
  std::vector<std::thread> workers;
  Function function = nullptr;
  void* context = nullptr;
  int tasks = 0;
  std::atomic<int> next{0};
  int running = 0;
  long round = 0;
  bool stop = false;

  void take_tasks(int thread) {
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      function(context, task, thread);
  }

  void work_until_stopped(int thread) {
    long seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        work.wait(lock, [&] { return stop || round != seen; });
        if (stop) return;
        seen = round;
      }
      take_tasks(thread);
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (--running == 0) done.notify_one();
      }
    }
  }
};

Team::Team(int threads) : threads_(1), state_(new State) {
  try {
    for (; threads_ < threads; ++threads_)
      state_->workers.emplace_back(&State::work_until_stopped, state_, threads_);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that are there do the work.
  }
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop = true;
  }
  state_->work.notify_all();
  for (auto& worker : state_->workers) worker.join();
  delete state_;
}

void Team::run(int tasks, Function function, void* context) {
  State& s = *state_;
  if (threads_ == 1 || tasks == 1) {
    for (int task = 0; task < tasks; ++task) function(context, task, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.function = function;
    s.context = context;
    s.tasks = tasks;
    s.next.store(0, std::memory_order_relaxed);
    s.running = threads_ - 1;
    ++s.round;
  }
  s.work.notify_all();
  s.take_tasks(0);
  std::unique_lock<std::mutex> lock(s.mutex);
  s.done.wait(lock, [&] { return s.running == 0; });
}

void* aligned_memory(std::int64_t bytes) {
  constexpr std::size_t kLine = 64, kHugePage = 1 << 21;
  const std::size_t wanted = bytes > 0 ? static_cast<std::size_t>(bytes) : 1;
  const std::size_t alignment = wanted >= 2 * kHugePage ? kHugePage : kLine;
  const std::size_t size = (wanted + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, size);
  if (!memory) throw std::bad_alloc();
  prefer_huge_pages(memory, static_cast<std::int64_t>(size));
  return memory;
}

void prefer_huge_pages(void* memory, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = 1 << 21;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace densityrl
