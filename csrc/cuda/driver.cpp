// The NVIDIA driver, opened at the first launch: the module that holds this is imported where there is none.
#include <cuda.h>  // types and constants only
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "launch.h"

namespace cast::cuda {
namespace {

// `cuGetProcAddress_v2`, libraries and tensor maps came with 12.0.
constexpr int OLDEST = 12000;

struct Driver {
  decltype(&cuDriverGetVersion) version;
  decltype(&cuLaunchKernelEx) launch;
  decltype(&cuLibraryLoadData) load;
  decltype(&cuLibraryGetKernel) kernel;
  decltype(&cuKernelSetAttribute) set_attribute;
  decltype(&cuTensorMapEncodeTiled) encode;
  decltype(&cuGetErrorString) words;
  decltype(&cuCtxGetDevice) device;
  decltype(&cuCtxGetCurrent) context;
  decltype(&cuCtxSetCurrent) set_context;
  decltype(&cuDeviceGet) device_of;
  decltype(&cuDevicePrimaryCtxRetain) primary;
#ifdef CAST_WATCHDOG
  decltype(&cuMemHostAlloc) host_memory;
  decltype(&cuStreamSynchronize) synchronize;
#endif

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(std::string("no NVIDIA driver: ") + dlerror());
    find_ = reinterpret_cast<decltype(find_)>(dlsym(library, "cuGetProcAddress_v2"));
    if (find_ == nullptr) throw std::runtime_error("the NVIDIA driver is older than CUDA 12.0");
    find("cuDriverGetVersion", version);
    find("cuLaunchKernelEx", launch);
    find("cuLibraryLoadData", load);
    find("cuLibraryGetKernel", kernel);
    find("cuKernelSetAttribute", set_attribute);
    find("cuTensorMapEncodeTiled", encode);
    find("cuGetErrorString", words);
    find("cuCtxGetDevice", device);
    find("cuCtxGetCurrent", context);
    find("cuCtxSetCurrent", set_context);
    find("cuDeviceGet", device_of);
    find("cuDevicePrimaryCtxRetain", primary);
#ifdef CAST_WATCHDOG
    find("cuMemHostAlloc", host_memory);
    find("cuStreamSynchronize", synchronize);
#endif
  }

  void check(CUresult result, const std::string& what) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    words(result, &text);
    throw std::runtime_error(what + ": " + (text == nullptr ? "unknown error" : text));
  }

 private:
  template <class Function>
  void find(const char* name, Function& to) {
    void* found = nullptr;
    CUdriverProcAddressQueryResult why;
    if (find_(name, &found, OLDEST, CU_GET_PROC_ADDRESS_DEFAULT, &why) != CUDA_SUCCESS || found == nullptr)
      throw std::runtime_error(std::string("the NVIDIA driver has no ") + name + "; CUDA 12.0 or newer is needed");
    to = reinterpret_cast<Function>(found);
  }
  CUresult (*find_)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*) = nullptr;
};

const Driver& driver() {
  static const Driver one;
  return one;
}

// Kernels by name. A library holds for every device of the process, so each is loaded once.
CUkernel find_kernel(const std::string& name) {
  static std::mutex mutex;
  static std::unordered_map<std::string, CUkernel> known;
  static std::vector<CUlibrary> libraries;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto at = known.find(name); at != known.end()) return at->second;
  if (libraries.empty()) {
    std::vector<CUlibrary> loaded;
    for (const Embedded& module : embedded()) {
      loaded.emplace_back();
      driver().check(driver().load(&loaded.back(), module.fatbin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
                     "loading the kernels of " + std::string(module.name));
    }
    libraries = std::move(loaded);
  }
  CUresult result = CUDA_ERROR_NOT_FOUND;
  for (const CUlibrary library : libraries) {
    CUkernel kernel;
    result = driver().kernel(&kernel, library, name.c_str());
    if (result == CUDA_SUCCESS) return known[name] = kernel;
    if (result != CUDA_ERROR_NOT_FOUND) break;
  }
  driver().check(result, "the kernel " + name);
  return nullptr;
}

CUtensorMapDataType type_of(Number type) {
  if (type == Number::bf16) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return type == Number::fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

void encode(const Tiled& tiled, void* to, const std::string& kernel) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {tiled.columns, tiled.rows}, strides[1] = {tiled.columns * bytes_of(tiled.type)};
  const cuuint32_t box[2] = {tiled.box_columns, tiled.box_rows}, steps[2] = {1, 1};
  driver().check(driver().encode(&map, type_of(tiled.type), 2, reinterpret_cast<void*>(tiled.address), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                 "a tensor map of " + kernel);
  static_assert(sizeof(map) == sizeof(TensorMap), "the driver's tensor map");
  std::memcpy(to, &map, sizeof(map));
}

// Leaked: what it holds may belong to Python, which is gone when statics end.
Recorder& recorder() {
  static Recorder& one = *new Recorder;
  return one;
}

}  // namespace

const char* name_of(Number type) { return type == Number::bf16 ? "bf16" : type == Number::fp16 ? "fp16" : "fp32"; }

void set_recorder(Recorder one) { recorder() = std::move(one); }
bool is_recorded() { return static_cast<bool>(recorder()); }

void run(const Launch& launch, Address stream) {
  if (is_recorded()) return recorder()(launch);
  const Driver& d = driver();
  CUkernel kernel = find_kernel(launch.kernel);
  CUdevice device;
  d.check(d.device(&device), "the current device");
  if (launch.shared_bytes > 48 * 1024)
    d.check(d.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(launch.shared_bytes),
                            kernel, device),
            "shared memory of " + launch.kernel);
  alignas(128) unsigned char argument[4096];
  if (launch.argument.size() > sizeof(argument)) throw std::runtime_error("an argument of more than 4096 bytes");
  std::memcpy(argument, launch.argument.data(), launch.argument.size());
  for (const Place& place : launch.places)
    if (place.is_map) encode(place.map, argument + place.at, launch.kernel);
  void* arguments[] = {argument};
  CUlaunchConfig config{};
  config.gridDimX = launch.grid;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = launch.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = launch.shared_bytes;
  config.hStream = reinterpret_cast<CUstream>(stream);
  // Kernels carry the size of their clusters.
  d.check(d.launch(&config, reinterpret_cast<CUfunction>(kernel), arguments, nullptr), launch.kernel);
#ifdef CAST_WATCHDOG
  const CUresult ended = d.synchronize(config.hStream);
  d.check(ended, launch.kernel + told_waits());
#endif
}

#ifdef CAST_WATCHDOG

LongWait* long_waits() {
  constexpr std::size_t BYTES = LONG_WAITS * sizeof(LongWait);
  if (is_recorded()) {
    static std::vector<LongWait> all(LONG_WAITS);
    return all.data();
  }
  static LongWait* const all = [] {
    void* made = nullptr;  // of the host, at the same address on every GPU
    driver().check(driver().host_memory(&made, BYTES, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
                   "memory that tells long waits");
    std::memset(made, 0, BYTES);
    return static_cast<LongWait*>(made);
  }();
  return all;
}

std::string told_waits() {
  constexpr const char* NAMES[] = {"full", "empty", "read", "incoming"};
  // Sources in which a wait is asked for.
  constexpr const char* FILES[] = {"ring.cuh",
                                   "rows.cuh",
                                   "residual.cuh",
                                   "bcast_weight_gradient.cu",
                                   "bcast_exchange_backward.cu",
                                   "bcast_project_backward.cu"};
  std::map<std::string, std::pair<int, std::string>>
      told;  // what is waited for -> by how many warps, and by which first
  for (int i = 0; i < LONG_WAITS; ++i) {
    LongWait& one = long_waits()[i];
    if (one.told == 0) continue;
    const char* file = "another file";
    for (const char* name : FILES)
      if (file_number(name) == one.source.file) file = name;
    const std::string what = std::string("parity ") + std::to_string(one.parity) + " of " +
                             NAMES[static_cast<unsigned>(one.barrier) % 4] + "[" + std::to_string(one.place) +
                             "], at shared byte " + std::to_string(one.address) + " (" + file + ":" +
                             std::to_string(one.source.line) + ")";
    auto& [count, first] = told[what];
    if (count++ == 0) first = "warp " + std::to_string(one.warp) + " of CTA " + std::to_string(one.cta);
    one = {};
  }
  std::string text;
  for (const auto& [what, by] : told)
    text += "; " + std::to_string(by.first) + " warps, first " + by.second + ", wait for " + what;
  return text;
}

#else

std::string told_waits() { return ""; }

#endif

void make_current(int device) {
  const Driver& d = driver();
  CUcontext context = nullptr;
  d.check(d.context(&context), "the current context");
  if (context != nullptr) return;
  CUdevice found;
  d.check(d.device_of(&found, device), "the GPU");
  d.check(d.primary(&context, found), "the GPU's context");  // held until the process ends, as PyTorch holds it
  d.check(d.set_context(context), "the GPU's context");
}

int toolkit() { return CUDA_VERSION; }

DriverState driver_state() {
  try {
    int version = 0;
    driver().check(driver().version(&version), "the driver's version");
    return {version, ""};
  } catch (const std::runtime_error& error) {
    return {0, error.what()};
  }
}

}  // namespace cast::cuda
