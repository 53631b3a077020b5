#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cast::cpu {
namespace {

constexpr std::size_t kPage = std::size_t(2) << 20;
constexpr std::size_t kMostKept = std::size_t(256) << 20;

struct Kept {
  std::mutex mutex;
  float* data = nullptr;
  std::size_t bytes = 0;
};

// Never destroyed: a thread may still compute while the process destroys static objects.
Kept& kept() {
  static Kept* instance = new Kept;
  return *instance;
}

}  // namespace

Workspace::Workspace(std::size_t floats) : data_(nullptr), bytes_((floats * sizeof(float) / kPage + 1) * kPage) {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes >= bytes_) {
      data_ = std::exchange(kept().data, nullptr);
      bytes_ = std::exchange(kept().bytes, 0);
      return;
    }
  }
  data_ = static_cast<float*>(std::aligned_alloc(kPage, bytes_));
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  madvise(data_, bytes_, MADV_HUGEPAGE);  // advice only: the result does not matter
#endif
}

Workspace::~Workspace() {
  float* old = data_;
  if (bytes_ <= kMostKept) {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes < bytes_) {
      old = std::exchange(kept().data, data_);
      kept().bytes = bytes_;
    }
  }
  std::free(old);
}

void* thread_buffer(std::size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    std::free(std::exchange(buffer.data, nullptr));
    buffer.bytes = 0;
    const std::size_t rounded = (bytes + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace cast::cpu
