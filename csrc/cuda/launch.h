// A launch of a kernel as a value, and who takes it: the NVIDIA driver, or a recorder that the emulator installs.
// No torch, no CUDA runtime.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "watchdog.h"

namespace cast::cuda {

using Address = std::uint64_t;  // of global memory

enum class Number { bf16, fp16, fp32 };
inline int bytes_of(Number type) { return type == Number::fp32 ? 4 : 2; }
const char* name_of(Number type);  // "bf16"

// A contiguous tensor of rows, as a tensor map sees it: what cuTensorMapEncodeTiled is given. The map is swizzled by
// 128 bytes, and elements out of bounds are zero.
struct Tiled {
  Address address;
  Number type;
  std::uint64_t columns, rows;
  std::uint32_t box_columns, box_rows;
};

// What lies at a byte of a kernel's argument besides plain numbers.
struct Place {
  int at;               // byte
  Address address;      // of the memory behind it
  std::uint64_t bytes;  // of that memory
  bool is_map;
  Tiled map;  // where it is one
};

// It views its argument, and lasts as long.
struct Launch {
  std::string kernel;
  unsigned grid, threads, cluster, shared_bytes;
  std::string_view argument;  // bytes of the kernel's only one; maps are still empty
  const std::vector<Place>& places;
};

#ifdef CAST_WATCHDOG
// Where kernels tell their long waits: LONG_WAITS of them, all of this process.
LongWait* long_waits();
#endif
// What they told, in words; "" if nothing.
std::string told_waits();

// Fills a kernel's argument and remembers where its pointers and maps are.
template <class Arguments>
class Argument {
 public:
  Arguments values{};

  Argument() { places_.reserve(128); }  // it grows in no kernel

  // A pointer to `bytes` of memory; null stays null.
  template <class T>
  void point(T*& member, Address address, std::uint64_t bytes) {
    member = reinterpret_cast<T*>(address);
    if (address != 0) places_.push_back({offset(&member), address, bytes, false, {}});
  }
  void map(TensorMap& member, const Tiled& tiled) {
    const std::uint64_t bytes = tiled.columns * tiled.rows * bytes_of(tiled.type);
    places_.push_back({offset(&member), tiled.address, bytes, true, tiled});
  }
  Launch launch(std::string kernel, unsigned grid, unsigned threads, unsigned cluster, unsigned shared_bytes) {
#ifdef CAST_WATCHDOG
    if constexpr (std::is_base_of_v<Watched, Arguments>)
      point(values.waits, reinterpret_cast<Address>(long_waits()), LONG_WAITS * sizeof(LongWait));
#endif
    const std::string_view bytes(reinterpret_cast<const char*>(&values), sizeof(values));
    return {std::move(kernel), grid, threads, cluster, shared_bytes, bytes, places_};
  }

 private:
  int offset(const void* member) const {
    return static_cast<int>(static_cast<const char*>(member) - reinterpret_cast<const char*>(&values));
  }
  std::vector<Place> places_;
};

// Who takes launches in place of the driver; empty: the driver does.
using Recorder = std::function<void(const Launch&)>;
void set_recorder(Recorder recorder);
bool is_recorded();

// Launch, on the current device. Throws std::runtime_error with the driver's own words.
void run(const Launch& launch, Address stream);

// A module that was embedded at the build: PTX, packed by zlib, and machine code of each architecture.
struct Embedded {
  std::string_view name, ptx, fatbin;
};
const std::vector<Embedded>& embedded();

// Give this thread the context of a GPU if it has none: a thread that has only launched, such as autograd's, may not.
void make_current(int device);

// Release of the toolkit that built this, as 13000 for 13.0. A driver runs its machine code if it is of the same series.
int toolkit();

// The driver's version as 12040 for 12.4, or why there is none.
struct DriverState {
  int version;
  std::string reason;
};
DriverState driver_state();

}  // namespace cast::cuda
