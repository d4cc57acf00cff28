// Memory for a fixed number of slots, of the same size each.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace evospec {

// All zeros at first; the system gives the memory of a slot when it is first written to.
template <typename T>
class SlotArray {
 public:
  SlotArray(int slots, size_t each) : each_(each), data_(allocate(slots * each), &std::free) {}

  T* of(int slot) const { return data_.get() + slot * each_; }
  void fill(int slot, T value) { std::fill_n(of(slot), each_, value); }
  size_t num_bytes() const { return each_ * sizeof(T); }  // of a slot

 private:
  static T* allocate(size_t count) {
    void* const data = std::calloc(std::max<size_t>(count, 1), sizeof(T));
    if (data == nullptr) throw std::bad_alloc();
    return static_cast<T*>(data);
  }

  size_t each_;
  std::unique_ptr<T, decltype(&std::free)> data_;
};

}  // namespace evospec
