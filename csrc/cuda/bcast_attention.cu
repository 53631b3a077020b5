// Kernel `attention`: O = softmax(Q K' / sqrt(head)) V inside windows, both ways in one launch.
//
// A CTA of four warps takes up to 64 queries of one clip and 64 channels, which are 4, 2 or 1 heads. A tile of queries
// holds whole windows where they fit, so its keys are the same rows of the other stream; of longer windows it takes 64
// queries of one, and walks over the keys in blocks of 64. A warp has 16 queries and skips keys that none of them sees.
// Products are mma.sync: windows of 8 would waste seven eighths of a wgmma, and time here is that of memory.
//
// Never across clips: a key outside of the window has probability zero, but zero times NaN is NaN, and one broken clip
// must not spoil another of the batch.
#include "bcast_windows.cuh"

namespace cast::cuda {
namespace {

struct alignas(1024) AttentionShared {
  unsigned char q[TILE_BYTES], k[2][TILE_BYTES], v[2][TILE_BYTES];
};

static_assert(sizeof(AttentionShared) == ATTENTION_SHARED, "what the host asks for");

// Softmax of one head that has seen some of its keys.
template <int HEAD>
struct Running {
  float o[HEAD / 8][4] = {};  // sum of 2^(s - top) V, see Place
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of the thread's two rows; its part of the total

  // Add KEYS keys, whose first is row `line` of the tiles; `all`: every query of the warp sees them all.
  template <class T, int KEYS>
  CAST_DEVICE void add(const uint32_t (&q)[HEAD / 4], uint32_t k_tile, uint32_t v_tile, int line, int channel,
                       int first_key, bool all, const int (&low)[2], int window, float scale, const Place& place) {
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n)
      multiply_rows<T, HEAD>(s + 2 * n, q, k_tile, line + 16 * n, channel, place.lane);
    if (!all)
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const unsigned inside = first_key + 8 * n + place.column + e % 2 - low[e / 2];
          if (inside >= static_cast<unsigned>(window)) s[n][e] = -INFINITY;
        }
    float higher[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) higher[e / 2] = fmaxf(higher[e / 2], s[n][e]);
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      higher[r] = fmaxf(higher[r], __shfl_xor_sync(~0u, higher[r], 1));
      higher[r] = fmaxf(higher[r], __shfl_xor_sync(~0u, higher[r], 2));
      higher[r] = fmaxf(higher[r] * scale, top[r]);
      shift[r] = higher[r] == -INFINITY ? 0.f : higher[r];  // no key of the row's window yet
      const float shrink = exp2_approximate(top[r] - shift[r]);
      top[r] = higher[r];
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < HEAD / 8; ++n) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& p = s[2 * n + e / 4][e % 4];
        p = exp2_approximate(fmaf(p, scale, -shift[e / 2 % 2]));
        total[e / 2 % 2] += p;
      }
      uint32_t p[4];
      as_operand<T>(p, s + 2 * n);
      multiply_columns<T, HEAD>(o, p, v_tile, line + 16 * n, channel, place.lane);
    }
  }
};

// One tile of queries, all heads of 64 channels. KEYS: that a warp takes at a time.
template <class T, int HEAD, int KEYS>
CAST_DEVICE void attend(const AttentionArguments& g, const AttentionWay& own, AttentionShared& shared, int tile,
                        int channel) {
  constexpr int HEADS = CHANNELS / HEAD;
  const int d = g.heads * HEAD;
  const WindowOrder order{tile / own.clip_tiles, g.frames, g.patches, own.in_time};
  const Span span(own, tile % own.clip_tiles, g.frames * g.patches);
  const T* q_from = static_cast<const T*>(own.q) + channel;
  const T* k_from = static_cast<const T*>(own.kv) + channel;

  bring(shared.q, q_from, d, span.first, span.end, order, own.asking);
  auto bring_keys = [&](int key, int buffer) {
    bring(shared.k[buffer], k_from, 2 * d, key, span.window_end, order, own.answering);
    bring(shared.v[buffer], k_from + d, 2 * d, key, span.window_end, order, own.answering);
    copy_commit();
  };
  bring_keys(span.window_begin, 0);

  const Place place(threadIdx.x);
  const int warp = threadIdx.x / 32;
  int low[2], at[2];  // where the window of a row begins; rows behind the end take the last one's
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    at[r] = span.first + place.row + 8 * r;
    low[r] = min(at[r], span.end - 1) / own.window * own.window;
  }
  const Sight sight(span, 16 * warp, own.window);

  uint32_t q[HEADS][HEAD / 4];
  Running<HEAD> running[HEADS];
  for (int key = span.window_begin, buffer = 0; key < span.window_end; key += BLOCK, buffer ^= 1) {
    if (key + BLOCK < span.window_end) {
      bring_keys(key + BLOCK, buffer ^ 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    if (key == span.window_begin) {
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
        left_operand<HEAD>(q[h], shared_address(shared.q), 16 * warp, h * HEAD, place.lane);
    }
    for (int line = 0; line < BLOCK && key + line < span.window_end; line += KEYS) {
      if (!sight.sees(key + line, KEYS)) continue;
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
        running[h].template add<T, KEYS>(q[h], shared_address(shared.k[buffer]), shared_address(shared.v[buffer]), line,
                                         h * HEAD, key + line, sight.sees_all(key + line, KEYS), low, own.window,
                                         g.scale, place);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool inside = at[r] < span.end;
    const int row = order.row(min(at[r], span.end - 1), own.asking);
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
    attend<T, HEAD, 32>(g, own, shared, tile, channel);
  }
}

}  // namespace

// CTAS: that an SM holds at once, as many as leave the kernel enough registers.
#define CAST_ATTENTION(NAME, T, HEAD, CTAS) \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, CTAS) \
      NAME(const __grid_constant__ AttentionArguments g) { \
    attention<T, HEAD>(g); \
  }

CAST_ATTENTION(bcast_attention_bf16_16, bf16, 16, 2)
CAST_ATTENTION(bcast_attention_bf16_32, bf16, 32, 3)
CAST_ATTENTION(bcast_attention_bf16_64, bf16, 64, 3)
CAST_ATTENTION(bcast_attention_fp16_16, fp16, 16, 2)
CAST_ATTENTION(bcast_attention_fp16_32, fp16, 32, 3)
CAST_ATTENTION(bcast_attention_fp16_64, fp16, 64, 3)

}  // namespace cast::cuda
