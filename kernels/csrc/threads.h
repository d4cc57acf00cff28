// A team of threads that runs one function together (SPMD), with barriers and shared work counters.
#pragma once

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

  // Inside run(): hands out items 0 .. count - 1 of the current phase, `chunk` at a time. Dynamic, so that a
  // thread whose core was taken by another process holds nobody up for more than one chunk.
  template <typename Item>
  void work(int count, int chunk, Item item) {
    std::atomic<int>& next = next_[phase_.load(std::memory_order_relaxed) % kCounters];
    for (int begin = next.fetch_add(chunk); begin < count; begin = next.fetch_add(chunk)) {
      const int end = begin + chunk < count ? begin + chunk : count;
      for (int i = begin; i < end; ++i) item(i);
    }
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
