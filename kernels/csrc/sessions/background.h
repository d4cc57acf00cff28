// One job at a time on a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace evospec {

// One thread posts jobs and waits for them. The thread that does them begins with the first.
class Background {
 public:
  ~Background() {
    wait();
    if (!worker_.joinable()) return;
    post(nullptr);
    worker_.join();
  }

  // Begins a job; the one before must have been waited for.
  void post(std::function<void()> job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = std::move(job);
      busy_.store(true, std::memory_order_relaxed);
    }
    changed_.notify_all();
    if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
  }

  // Until the job is done; what it has written can be read then.
  void wait() {
    if (!busy_.load(std::memory_order_acquire)) return;
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !busy_.load(std::memory_order_acquire); });
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return busy_.load(std::memory_order_relaxed); });
      if (job_ == nullptr) return;
      lock.unlock();
      job_();
      lock.lock();
      busy_.store(false, std::memory_order_release);
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> busy_{false};
  std::function<void()> job_;  // none: the end
  std::thread worker_;
};

}  // namespace evospec
