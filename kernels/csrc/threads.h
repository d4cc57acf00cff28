// A team of threads that runs one function together (SPMD), with barriers and shared work counters.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace evospec {

class Team {
 public:
  explicit Team(int num_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return num_threads_; }

  // Runs body(thread_index) on all threads, the caller being thread 0, and waits for all of them.
  void run(const std::function<void(int)>& body);

  // Inside run(): waits for all threads, and starts the next phase of work().
  void barrier();

  // Inside run(): hands out ranges of the items 0 .. count - 1 of the current phase; body(begin, end). Ranges are
  // long at first (memory is read forward) and short at the end, so that a thread whose core was taken by another
  // process holds nobody up for long (guided self-scheduling).
  template <typename Body>
  void work_ranges(int count, Body body) {
    std::atomic<int>& next = next_[phase_.load(std::memory_order_relaxed) % kCounters];
    int begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      const int size = std::max(1, (count - begin) / (2 * num_threads_));
      if (!next.compare_exchange_weak(begin, begin + size)) continue;
      body(begin, begin + size);
      begin = next.load(std::memory_order_relaxed);
    }
  }

  // The same, item by item.
  template <typename Item>
  void work(int count, Item item) {
    work_ranges(count, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) item(i);
    });
  }

 private:
  static constexpr int kCounters = 4;

  void start_workers();
  void worker(int index);

  const int num_threads_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* body_ = nullptr;

  std::atomic<unsigned> generation_{0};
  std::atomic<bool> stopping_{false};

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
  alignas(64) std::atomic<int> next_[kCounters] = {};
};

}  // namespace evospec
