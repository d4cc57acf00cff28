// A team of threads that runs one function together (SPMD), with barriers and shares of work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
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

  // Inside run(): does the items 0 .. count - 1 of the current phase, `size` at a time: body(begin, end, share_end).
  // A thread begins with a share of its own, in order, so that it reads memory forward, and then helps the others: one
  // whose core was taken by another process holds nobody up for long. share_end: where the thread's own items end;
  // `end`, where it helps.
  template <typename Body>
  void work_ranges(int count, int size, Body body) {
    for (int i = 0; i < num_threads_; ++i) {
      const int share = (index_ + i) % num_threads_;
      const int first = share_begin(share, count), last = share_begin(share + 1, count);
      std::atomic<int>& taken = shares_[share].taken[phase_.load(std::memory_order_relaxed) % kPhases];
      for (int begin; (begin = first + taken.fetch_add(size, std::memory_order_relaxed)) < last;) {
        const int end = std::min(begin + size, last);
        body(begin, end, i == 0 ? last : end);
      }
    }
  }

  // The first of the calling thread's own items of `count`.
  int first_item(int count) const { return share_begin(index_, count); }

  // The same, item by item.
  template <typename Item>
  void work(int count, Item item) {
    work_ranges(count, 1, [&](int i, int, int) { item(i); });
  }

 private:
  static constexpr int kPhases = 4;

  struct alignas(64) Share {
    std::atomic<int> taken[kPhases] = {};  // how many of its items, by phase
  };

  void start_workers();
  void worker(int index);
  int share_begin(int share, int count) const {
    return static_cast<int>(static_cast<int64_t>(count) * share / num_threads_);
  }

  static thread_local int index_;  // of the calling thread

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::vector<Share> shares_;
  const std::function<void(int)>* body_ = nullptr;

  std::atomic<unsigned> generation_{0};
  std::atomic<bool> stopping_{false};

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

}  // namespace evospec
