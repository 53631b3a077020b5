// The vector machine's functions, once for each instruction-set level. The build names the level: PTX_LEVEL.
#pragma once

#include <cstdint>

#define PTX_JOIN(a, b) a##b
#define PTX_NAME(a, b) PTX_JOIN(a, b)

// handler: the name of a code, null behind the last.
// run: instructions on every CTA's lanes of `live`, [CTAs][threads], null for all; `step` counts the accesses to shared
//   memory before. 0: an instruction cannot be done; the batch says which, and for which CTA.
// walk: one CTA from its first block on, as far as it goes alone; returns an Outcome.
// product: a wgmma of every active warpgroup. operand: one begins to read an operand in shared memory, or is waited for.
// copies, forget: the copies in flight of a batch, made and destroyed. flying: how many there are. products, drop: the wgmma state of a CTA
// that runs alone, made and destroyed. idle: whether no product is in flight. take: a batch of one CTA takes over those
// of a CTA of another one.
#define PTX_DECLARE(level) \
  extern "C" const char* PTX_NAME(ptx_handler_, level)(int64_t code); \
  extern "C" int PTX_NAME(ptx_run_, level)(void* batch, const void* ops, int64_t count, const uint8_t* live, \
                                           int64_t step); \
  extern "C" int PTX_NAME(ptx_walk_, level)(void* batch, const void* blocks, int64_t count, const void* ops, \
                                            int64_t cta); \
  extern "C" void PTX_NAME(ptx_product_, level)(void* batch, const void* product); \
  extern "C" void PTX_NAME(ptx_operand_, level)(void* batch, const void* operand, const uint8_t* groups, \
                                                int64_t count, int64_t number, int64_t step, int reads); \
  extern "C" void* PTX_NAME(ptx_copies_, level)(int64_t ctas, int64_t threads); \
  extern "C" void PTX_NAME(ptx_forget_, level)(void* copies); \
  extern "C" int64_t PTX_NAME(ptx_flying_, level)(const void* copies); \
  extern "C" void* PTX_NAME(ptx_products_, level)(int64_t watched, int64_t keys, const int32_t* columns, \
                                                  int64_t threads); \
  extern "C" void PTX_NAME(ptx_drop_, level)(void* products); \
  extern "C" int PTX_NAME(ptx_idle_, level)(const void* products); \
  extern "C" int64_t PTX_NAME(ptx_bytes_, level)(); \
  extern "C" void PTX_NAME(ptx_take_, level)(void* copies, void* other, int64_t cta, int64_t threads);
