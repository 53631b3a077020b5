// Buffers that notice what a kernel does outside them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

namespace cast::test {

using i64 = std::int64_t;

// A quiet NaN whose payload no arithmetic produces: what a canary holds, and what memory holds before it is written.
constexpr std::uint32_t kPoison = 0x7fc0ca57u;

inline float poison() {
  float value;
  std::memcpy(&value, &kPoison, sizeof(value));
  return value;
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// `count` floats between two guard bands. A float buffer starts one float past a 64-byte line, so that no vector is
// aligned; scratch memory starts on a line, as the core's own does. Under AddressSanitizer nothing follows the buffer:
// its red zone notices reads as well, and to a single float.
class Guarded {
 public:
  enum class Start { odd, aligned };

  explicit Guarded(i64 count, Start start = Start::odd) : count_(count), before_(kBefore + (start == Start::odd)) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(float) * std::size_t(before_ + count_ + kAfter))) throw std::bad_alloc();
    whole_ = static_cast<float*>(memory);
    for (i64 i = 0; i < before_ + count_ + kAfter; ++i) whole_[i] = poison();
  }
  ~Guarded() { std::free(whole_); }
  Guarded(Guarded&& other) noexcept : whole_(other.whole_), count_(other.count_), before_(other.before_) {
    other.whole_ = nullptr;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  float* data() const { return whole_ + before_; }
  i64 size() const { return count_; }
  std::vector<float> values() const { return {data(), data() + count_}; }

  bool intact() const {
    for (i64 i = 0; i < before_; ++i)
      if (bits_of(whole_[i]) != kPoison) return false;
    for (i64 i = 0; i < kAfter; ++i)
      if (bits_of(data()[count_ + i]) != kPoison) return false;
    return true;
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr i64 kBefore = 0, kAfter = 0;
#else
  static constexpr i64 kBefore = 64, kAfter = 67;
#endif
  float* whole_;
  i64 count_, before_;
};

// All buffers of one call.
class Arena {
 public:
  float* take(i64 count, Guarded::Start start = Guarded::Start::odd) {
    buffers_.emplace_back(count, start);
    return buffers_.back().data();
  }
  float* copy(const std::vector<float>& values) {
    float* at = take(i64(values.size()));
    if (!values.empty()) std::memcpy(at, values.data(), sizeof(float) * values.size());
    return at;
  }
  bool intact() const {
    for (const Guarded& buffer : buffers_)
      if (!buffer.intact()) return false;
    return true;
  }

 private:
  std::vector<Guarded> buffers_;
};

// Normally distributed floats, the same on every machine: std::normal_distribution may differ between libraries.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double uniform() { return double(engine_() >> 5) / double(1u << 27); }
  double normal() {  // the sum of twelve uniform numbers has variance one
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  std::vector<float> normals(i64 count, double deviation, double mean = 0) {
    std::vector<float> values(std::size_t(count), 0.0f);
    for (float& x : values) x = float(mean + deviation * normal());
    return values;
  }

 private:
  std::mt19937 engine_;
};

}  // namespace cast::test
