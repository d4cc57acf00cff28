#include "threads.h"

#include <immintrin.h>
#include <sched.h>

namespace evospec {

namespace {
// Between steps the engine's Python needs about a millisecond: workers sleep rather than burn a core that the
// API server could use. Inside a step the wait is microseconds: spin, and yield only if the core is contended.
constexpr int kSpinsBeforeSleep = 2000;
constexpr int kSpinsBeforeYield = 20000;
}  // namespace

Team::Team(int num_threads) : num_threads_(num_threads) {
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { worker(i); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& body) {
  body_ = &body;
  if (num_threads_ > 1) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }
  body(0);
  barrier();  // nobody may still be inside body when the caller destroys it
}

void Team::worker(int index) {
  unsigned seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpinsBeforeSleep && generation_.load(std::memory_order_acquire) == seen; ++spin) {
      _mm_pause();
    }
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    }
    ++seen;
    if (stopping_) return;
    (*body_)(index);
    barrier();
  }
}

void Team::barrier() {
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    // The counter two phases ahead: no thread can be using it, since all of them are at this barrier.
    next_[(phase + 2) % kCounters].store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
    _mm_pause();
    if (spin > kSpinsBeforeYield) sched_yield();
  }
}

}  // namespace evospec
