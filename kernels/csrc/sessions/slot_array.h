// Memory for a fixed number of slots, of the same size each.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include <sys/mman.h>

namespace evospec {

// All zeros at first; the system gives memory when it is first written to, in large pages where it has them: what is read
// in a step is all over it. It begins a page and shares none, so that it can be registered with a GPU's driver.
template <typename T>
class SlotArray {
 public:
  SlotArray(int slots, size_t each) : each_(each), bytes_(std::max<size_t>(slots * each, 1) * sizeof(T)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  SlotArray(const SlotArray&) = delete;
  SlotArray& operator=(const SlotArray&) = delete;
  ~SlotArray() { munmap(data_, bytes_); }

  T* of(int slot) const { return static_cast<T*>(data_) + slot * each_; }
  void fill(int slot, T value) { std::fill_n(of(slot), each_, value); }
  size_t num_bytes() const { return each_ * sizeof(T); }  // of a slot

 private:
  size_t each_, bytes_;
  void* data_;
};

}  // namespace evospec
