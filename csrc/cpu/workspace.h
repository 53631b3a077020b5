// Scratch memory of one call.
#pragma once

#include <cstddef>

namespace cast::cpu {

// `floats` uninitialised floats, 2 MiB aligned. The process keeps one buffer between calls, because mapping and zeroing
// tens of MiB anew costs milliseconds; a call that finds it in use gets its own. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(std::size_t floats);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
  std::size_t bytes_;
};

// `bytes` of memory of the calling thread, 64-byte aligned, contents undefined. The address stays the same until a call
// asks for more. Freed when the thread ends. Throws std::bad_alloc.
void* thread_buffer(std::size_t bytes);

}  // namespace cast::cpu
