// Kernel `attention`: O = softmax(Q K' / sqrt(head)) V inside windows, both ways in one launch.
//
// A CTA of four warps takes up to 64 queries of one clip and 64 channels, which are 4, 2 or 1 heads. A tile of queries
// holds whole windows where they fit, so its keys are the same rows of the other stream; of longer windows it takes 64
// queries of one, and walks over the keys in blocks of 64. A warp has 16 queries and skips keys that none of them sees.
// Products are mma.sync: windows of 8 would waste seven eighths of a wgmma, and time here is that of memory.
//
// Never across clips: a key outside of the window has probability zero, but zero times NaN is NaN, and one broken clip
// must not spoil another of the batch.
#include "bcast_arguments.h"
#include "tile.cuh"

namespace cast::cuda {
namespace {

constexpr int ATTENTION_THREADS = 128, CHANNELS = 64, BLOCK = 64;

struct alignas(1024) AttentionShared {
  unsigned char q[TILE_BYTES], k[2][TILE_BYTES], v[2][TILE_BYTES];
};

// acc[16 x 8] += A[16 x 16] B[16 x 8]
template <class T>
CAST_DEVICE void multiply(float* acc, const uint32_t* a, const uint32_t* b) {
  if constexpr (IS_BF16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The rows of a stream in window order: token i of a clip -> row of the stream.
struct WindowOrder {
  int clip, frames, patches, by_patch;

  CAST_DEVICE int row(int i, Tokens tokens) const {
    const int frame = by_patch ? i % frames : i / patches, patch = by_patch ? i / frames : i % patches;
    return (clip * frames + frame) * tokens.frame_rows + tokens.cls + patch;
  }
};

// 64 rows of 64 channels to shared memory, those from `end` on as zero. Each thread brings half of a row.
template <class T>
CAST_DEVICE void bring(unsigned char* to, const T* from, int stride, int first, int end, const WindowOrder& order,
                       Tokens tokens) {
  const int line = threadIdx.x / 2, i = first + line;
  const T* source = from + int64_t(i < end ? order.row(i, tokens) : 0) * stride;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int chunk = threadIdx.x % 2 * 4 + c;
    copy_16(to + swizzled(line, chunk), source + 8 * chunk, i < end ? 16 : 0);
  }
}

// Softmax of one head that has seen some of its keys.
template <int HEAD>
struct Running {
  float o[HEAD / 8][4] = {};                     // sum of 2^(s - top) V, see Place
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of the thread's two rows; its part of the total

  // Add KEYS keys, whose first is row `line` of the tiles.
  template <class T, int KEYS>
  CAST_DEVICE void add(const uint32_t (&q)[HEAD / 4], uint32_t k_tile, uint32_t v_tile, int line, int channel,
                       int first_key, const int (&low)[2], int window, float scale, const Place& place) {
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n)
#pragma unroll
      for (int c = 0; c < HEAD / 16; ++c) {
        uint32_t k[4];
        const int matrix = place.lane / 8, key = line + 16 * n + 8 * (matrix / 2) + place.lane % 8;
        load_matrices(k, k_tile + swizzled(key, channel / 8 + 2 * c + matrix % 2));
        multiply<T>(s[2 * n], q + 4 * c, k);
        multiply<T>(s[2 * n + 1], q + 4 * c, k + 2);
      }
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const unsigned inside = first_key + 8 * n + place.column + e % 2 - low[e / 2];
        s[n][e] = inside < static_cast<unsigned>(window) ? s[n][e] * scale : -INFINITY;
        higher[e / 2] = fmaxf(higher[e / 2], s[n][e]);
      }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      higher[r] = fmaxf(higher[r], __shfl_xor_sync(~0u, higher[r], 1));
      higher[r] = fmaxf(higher[r], __shfl_xor_sync(~0u, higher[r], 2));
      shift[r] = higher[r] == -INFINITY ? 0.f : higher[r];  // no key of the row's window yet
      const float shrink = exp2_approximate(top[r] - shift[r]);
      top[r] = higher[r];
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < HEAD / 8; ++n) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      uint32_t p[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // e: row e % 2, keys 8 (e / 2) on
        const float* pair = s[2 * n + e / 2] + 2 * (e % 2);
        const float first = exp2_approximate(pair[0] - shift[e % 2]), second = exp2_approximate(pair[1] - shift[e % 2]);
        total[e % 2] += first + second;
        p[e] = pack<T>(first, second);
      }
#pragma unroll
      for (int c = 0; c < HEAD / 16; ++c) {
        uint32_t v[4];
        const int matrix = place.lane / 8, key = line + 16 * n + 8 * (matrix % 2) + place.lane % 8;
        load_matrices_transposed(v, v_tile + swizzled(key, channel / 8 + 2 * c + matrix / 2));
        multiply<T>(o[2 * c], p, v);
        multiply<T>(o[2 * c + 1], p, v + 2);
      }
    }
  }
};

// O of CLS is zero: its rows go through products whose results nobody reads, and would carry what memory held before.
template <class T>
CAST_DEVICE void zero_cls(T* o, int stride, int first, int frames, Tokens tokens) {
  const int frame = first + threadIdx.x / 2;
  if (frame >= frames) return;
  uint4* to = reinterpret_cast<uint4*>(o + int64_t(frame) * tokens.frame_rows * stride) + threadIdx.x % 2 * 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = make_uint4(0, 0, 0, 0);
}

// One tile of queries, all heads of 64 channels. KEYS: that a warp takes at a time.
template <class T, int HEAD, int KEYS>
CAST_DEVICE void attend(const AttentionArguments& g, const AttentionWay& own, AttentionShared& shared, int tile,
                        int channel) {
  constexpr int HEADS = CHANNELS / HEAD;
  const int d = g.heads * HEAD, clip_rows = g.frames * g.patches, kv_stride = 2 * d;
  const WindowOrder order{tile / own.clip_tiles, g.frames, g.patches, own.by_patch};
  const int number = tile % own.clip_tiles;
  // Queries [first, end) of the clip, keys [key_begin, key_end).
  const int window_begin = number / own.tiles_of_window * (own.tiles_of_window == 1 ? own.tile_queries : own.window);
  const int first = window_begin + number % own.tiles_of_window * BLOCK;
  const int key_begin = window_begin;
  const int key_end = min(window_begin + (own.tiles_of_window == 1 ? own.tile_queries : own.window), clip_rows);
  const int end = min(first + BLOCK, key_end);
  const T* q_from = static_cast<const T*>(own.q) + channel;
  const T* k_from = static_cast<const T*>(own.kv) + channel;

  bring(shared.q, q_from, d, first, end, order, own.asking);
  auto bring_keys = [&](int key, int buffer) {
    bring(shared.k[buffer], k_from, kv_stride, key, key_end, order, own.answering);
    bring(shared.v[buffer], k_from + d, kv_stride, key, key_end, order, own.answering);
    copy_commit();
  };
  bring_keys(key_begin, 0);

  const Place place(threadIdx.x);
  const int warp = threadIdx.x / 32;
  int low[2], at[2];  // where the window of a row begins; rows behind the end take the last one's
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    at[r] = first + place.row + 8 * r;
    low[r] = min(at[r], end - 1) / own.window * own.window;
  }
  const int warp_first = min(first + 16 * warp, end - 1), warp_last = min(first + 16 * warp + 15, end - 1);
  const int sees_from = warp_first / own.window * own.window, sees_to = warp_last / own.window * own.window + own.window;

  uint32_t q[HEADS][HEAD / 4];
  Running<HEAD> running[HEADS];
  for (int key = key_begin, buffer = 0; key < key_end; key += BLOCK, buffer ^= 1) {
    if (key + BLOCK < key_end) {
      bring_keys(key + BLOCK, buffer ^ 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    if (key == key_begin) {
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int c = 0; c < HEAD / 16; ++c) {
          const int row = 16 * warp + place.lane % 16, chunk = h * HEAD / 8 + 2 * c + place.lane / 16;
          load_matrices(q[h] + 4 * c, shared_address(shared.q) + swizzled(row, chunk));
        }
    }
    for (int line = 0; line < BLOCK && key + line < key_end; line += KEYS) {
      if (key + line >= sees_to || key + line + KEYS <= sees_from) continue;
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
        running[h].template add<T, KEYS>(q[h], shared_address(shared.k[buffer]), shared_address(shared.v[buffer]), line,
                                         h * HEAD, key + line, low, own.window, g.scale, place);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool inside = at[r] < end;
    const int row = order.row(min(at[r], end - 1), own.asking);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const float total = sum_of_row(running[h].total[r]), share = 1.f / total;
      if (!inside) continue;
      T* to = static_cast<T*>(own.o) + int64_t(row) * d + channel + h * HEAD + place.column;
#pragma unroll
      for (int n = 0; n < HEAD / 8; ++n)
        *reinterpret_cast<uint32_t*>(to + 8 * n) =
            pack<T>(running[h].o[n][2 * r] * share, running[h].o[n][2 * r + 1] * share);
      if (own.lse != nullptr && place.lane % 4 == 0)
        own.lse[int64_t(row) * g.heads + channel / HEAD + h] = running[h].top[r] + log2f(total);
    }
  }
}

template <class T, int HEAD>
CAST_DEVICE void attention(const AttentionArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  AttentionShared& shared = *reinterpret_cast<AttentionShared*>(raw);
  const int groups = g.heads * HEAD / CHANNELS, channel = blockIdx.x % groups * CHANNELS;
  int tile = blockIdx.x / groups;
  const bool second = tile >= g.ways[0].tiles;
  const AttentionWay& own = g.ways[second];
  if (second) tile -= g.ways[0].tiles;
  const int attending = g.clips * own.clip_tiles;
  if (tile >= attending) {
    const int d = g.heads * HEAD;
    zero_cls(static_cast<T*>(own.o) + channel, d, (tile - attending) * 64, g.clips * g.frames, own.asking);
  } else if (own.window <= 16) {
    attend<T, HEAD, 16>(g, own, shared, tile, channel);
  } else {
    attend<T, HEAD, 64>(g, own, shared, tile, channel);
  }
}

}  // namespace

#define CAST_ATTENTION(NAME, T, HEAD)                                       \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 4)        \
      NAME(const __grid_constant__ AttentionArguments g) {                  \
    attention<T, HEAD>(g);                                                  \
  }

CAST_ATTENTION(bcast_attention_bf16_16, bf16, 16)
CAST_ATTENTION(bcast_attention_bf16_32, bf16, 32)
CAST_ATTENTION(bcast_attention_bf16_64, bf16, 64)
CAST_ATTENTION(bcast_attention_fp16_16, fp16, 16)
CAST_ATTENTION(bcast_attention_fp16_32, fp16, 32)
CAST_ATTENTION(bcast_attention_fp16_64, fp16, 64)

}  // namespace cast::cuda
