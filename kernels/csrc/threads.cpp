#include "threads.h"

#include <immintrin.h>
#include <sched.h>

namespace evospec {

namespace {

// A pause is about 50 ns. Threads of a step arrive within some ten microseconds of each other, and waking a sleeping
// one takes as long again. Beyond that another process has one's core: then the others must sleep, so that the kernel
// can move the late one to a core that does nothing.
constexpr int kSpinsAtBarrier = 2000;
// Between two products of a step there is Python, some hundred microseconds of it; a step that follows comes as soon.
constexpr int kSpinsWithoutWork = 8000;
// So often it lets another process run that waits for its core, such as the server, which has the last step's tokens to
// send: else that one takes the core of a thread that computes.
constexpr int kSpinsBetweenYields = 200;

void wait_while_equal(const std::atomic<unsigned>& value, unsigned old, int most_spins) {
  for (int spin = 1; spin <= most_spins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    if (spin % kSpinsBetweenYields == 0) {
      sched_yield();
    } else {
      _mm_pause();
    }
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

thread_local int Team::index_ = 0;

Team::Team(int num_threads) : num_threads_(num_threads), shares_(num_threads) {
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { worker(i); });
}

Team::~Team() {
  stopping_ = true;
  start_workers();
  for (std::thread& thread : threads_) thread.join();
}

void Team::start_workers() {
  generation_.fetch_add(1, std::memory_order_seq_cst);  // as in barrier()
  generation_.notify_all();
}

void Team::run(const std::function<void(int)>& body) {
  body_ = &body;
  start_workers();
  body(0);
  barrier();  // nobody may still be inside body when the caller destroys it
}

void Team::worker(int index) {
  index_ = index;
  for (unsigned seen = 0;; ++seen) {
    wait_while_equal(generation_, seen, kSpinsWithoutWork);
    if (stopping_) return;
    (*body_)(index);
    barrier();
  }
}

void Team::barrier() {
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  // Its counter two phases ahead: no thread can be using it, since all of them are at this barrier, or before it.
  shares_[index_].taken[(phase + 2) % kPhases].store(0, std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) < num_threads_ - 1) {
    wait_while_equal(phase_, phase, kSpinsAtBarrier);
    return;
  }
  arrived_.store(0, std::memory_order_relaxed);
  // Sequentially consistent, not just a release: notify_all skips the system call where it sees no sleeper, and with a
  // weaker store it could look before the store is visible to a thread that is just falling asleep, for ever.
  phase_.store(phase + 1, std::memory_order_seq_cst);
  phase_.notify_all();
}

}  // namespace evospec
