// Kernel `attention_backward`: dQ, dK and dV of the windowed attention, both ways in one launch.
//
//     P = softmax(Q K' / sqrt(head));  dV = P' dO;  dP = dO V';  dS = P (dP - delta);  dQ = dS K / sqrt(head);
//     dK = dS' Q / sqrt(head);  delta = rowsum(P dP), which equals rowsum(dO O).
//
// A warp owns 16 queries, or 16 keys; for keys it computes scores transposed. So no gradient is added to by two warps,
// and nothing is atomic. Where windows fit a tile one CTA does both, and delta is the sum over P dP in float32: O was
// rounded, and where a softmax is saturated that rounding is what remains of dS. There P is divided by its sum again:
// the error of the stored log-sum-exp is equal for all elements of a row, and would not average out in the biases'
// gradients. Longer windows have CTAs for queries and CTAs for keys, and take rowsum(dO O).
#include "bcast_attention_gradient.cuh"

namespace cast::cuda {
namespace {

struct alignas(1024) AttentionBackwardShared {
  unsigned char tiles[8][TILE_BYTES];
  Levels levels[2];
};

static_assert(sizeof(AttentionBackwardShared) == ATTENTION_BACKWARD_SHARED, "what the host asks for");

// One tile of work: where its rows lie.
template <class T>
struct Work {
  const AttendedWay& own;
  Span span;
  WindowOrder order;
  int heads, d, channel;
  float scale, grad_scale;

  CAST_DEVICE Work(const AttentionBackwardArguments& g, const AttendedWay& way, int tile, int head_width, int channel)
      : own(way),
        span(way, tile % way.clip_tiles, g.frames * g.patches),
        order{tile / way.clip_tiles, g.frames, g.patches, way.in_time},
        heads(g.heads),
        d(g.heads * head_width),
        channel(channel),
        scale(g.scale),
        grad_scale(g.grad_scale) {}

  CAST_DEVICE void bring_asking(unsigned char* to, const void* from, int first, int end) const {
    bring(to, static_cast<const T*>(from) + channel, d, first, end, order, own.asking);
  }
  // Keys, or at `offset` d values.
  CAST_DEVICE void bring_answering(unsigned char* to, int offset, int first, int end) const {
    bring(to, static_cast<const T*>(own.kv) + offset + channel, 2 * d, first, end, order, own.answering);
  }
  // Log-sum-exp of 64 queries as levels; of those behind the end it is infinite, so that their P is zero.
  template <int HEADS>
  CAST_DEVICE void bring_levels(Levels& to, int first, int end) const {
    for (int i = threadIdx.x; i < BLOCK * HEADS; i += ATTENTION_THREADS) {
      const int query = i / HEADS, head = i % HEADS;
      const bool inside = first + query < end;
      const int64_t row = inside ? order.row(first + query, own.asking) : 0;
      to.level[head][query] = inside ? own.lse[row * heads + channel / (d / heads) + head] : INFINITY;
    }
  }
};

// A warp's 16 rows of a gradient to memory; of rows behind the end nothing.
template <class T, int HEAD>
CAST_DEVICE void store_rows(T* to, int stride, const float (*acc)[4], float scale, const Span& span,
                            const WindowOrder& order, Tokens tokens, const Place& place) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = span.first + place.row + 8 * r;
    if (at >= span.end) continue;
    T* row = to + int64_t(order.row(at, tokens)) * stride + place.column;
#pragma unroll
    for (int n = 0; n < HEAD / 8; ++n)
      *reinterpret_cast<uint32_t*>(row + 8 * n) = pack<T>(scale * acc[n][2 * r], scale * acc[n][2 * r + 1]);
  }
}

// Where the windows of a thread's two rows begin; rows behind the end take the last one's.
CAST_DEVICE void window_begins(int (&low)[2], const Span& span, const Place& place, int window) {
#pragma unroll
  for (int r = 0; r < 2; ++r) low[r] = min(span.first + place.row + 8 * r, span.end - 1) / window * window;
}

template <class T, int HEAD>
CAST_DEVICE void store_keys(const Work<T>& work, const Keys<T, HEAD>& keys, int channel, const Place& place) {
  T* to = static_cast<T*>(work.own.grad_kv) + work.channel + channel;
  store_rows<T, HEAD>(to, 2 * work.d, keys.grad_k, work.grad_scale, work.span, work.order, work.own.answering, place);
  store_rows<T, HEAD>(to + work.d, 2 * work.d, keys.grad_v, 1.f, work.span, work.order, work.own.answering, place);
}

// Whole windows: their queries and their keys are the tile's rows.
template <class T, int HEAD>
CAST_DEVICE void whole_windows(const Work<T>& work, AttentionBackwardShared& shared) {
  constexpr int HEADS = CHANNELS / HEAD;
  const AttendedWay& own = work.own;
  const Span& span = work.span;
  work.bring_asking(shared.tiles[0], own.q, span.first, span.end);
  work.bring_asking(shared.tiles[1], own.grad_o, span.first, span.end);
  work.bring_answering(shared.tiles[2], 0, span.first, span.end);
  work.bring_answering(shared.tiles[3], work.d, span.first, span.end);
  copy_commit();
  work.template bring_levels<HEADS>(shared.levels[0], span.first, span.end);
  copy_wait<0>();
  __syncthreads();
  const Place place(threadIdx.x);
  const int line = threadIdx.x / 32 * 16;
  const Sight sight(span, line, own.window);
  int low[2];
  window_begins(low, span, place, own.window);
  const uint32_t q = shared_address(shared.tiles[0]), grad_o = shared_address(shared.tiles[1]);
  const uint32_t k = shared_address(shared.tiles[2]), v = shared_address(shared.tiles[3]);
  // Steps of 16 opposite rows that the warp sees.
  const int from = (sight.from - span.first) / 16 * 16, to = min(sight.to, span.end) - span.first;
#pragma unroll 1
  for (int h = 0; h < HEADS; ++h) {
    const int channel = h * HEAD;
    Levels& levels = shared.levels[0];
    Queries<T, HEAD> mine;
    left_operand<HEAD>(mine.q, q, line, channel, place.lane);
    left_operand<HEAD>(mine.grad_o, grad_o, line, channel, place.lane);
    float total[2] = {}, product[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) mine.level[r] = levels.level[h][place.row + 8 * r];
    for (int at = from; at < to; at += 16) {
      float p[2][4], dp[2][4];
      mine.scores(p, dp, k, v, at, channel, span.first + at, sight.sees_all(span.first + at, 16), low, own.window,
                  work.scale, place);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[e / 2] += p[n][e];
          product[e / 2] = fmaf(p[n][e], dp[n][e], product[e / 2]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_row(total[r]), with = sum_of_row(product[r]);
      if (span.first + place.row + 8 * r >= span.end) continue;  // its level is infinite
      mine.level[r] += log2f(sum);
      mine.delta[r] = with / sum;
    }
    __syncwarp();  // three other lanes read the row's level above
    if (place.lane % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool inside = span.first + place.row + 8 * r < span.end;
        levels.level[h][place.row + 8 * r] = inside ? mine.level[r] : INFINITY;
        levels.delta[h][place.row + 8 * r] = inside ? mine.delta[r] : 0.f;
      }
    for (int at = from; at < to; at += 16) {
      float p[2][4], dp[2][4];
      mine.scores(p, dp, k, v, at, channel, span.first + at, sight.sees_all(span.first + at, 16), low, own.window,
                  work.scale, place);
      mine.add(p, dp, k, at, channel, place.lane);
    }
    T* grad_q = static_cast<T*>(own.grad_q) + work.channel + channel;
    store_rows<T, HEAD>(grad_q, work.d, mine.grad_q, work.grad_scale, span, work.order, own.asking, place);
  }
  __syncthreads();  // levels and deltas of all queries are there
#pragma unroll 1
  for (int h = 0; h < HEADS; ++h) {
    const int channel = h * HEAD;
    Keys<T, HEAD> mine;
    left_operand<HEAD>(mine.k, k, line, channel, place.lane);
    left_operand<HEAD>(mine.v, v, line, channel, place.lane);
    for (int at = from; at < to; at += 16)
      mine.add(q, grad_o, shared.levels[0].level[h], shared.levels[0].delta[h], at, channel, span.first + at,
               sight.sees_all(span.first + at, 16), low, own.window, work.scale, place);
    store_keys(work, mine, channel, place);
  }
}

// 64 queries of a longer window: a walk over its keys.
template <class T, int HEAD>
CAST_DEVICE void some_queries(const Work<T>& work, AttentionBackwardShared& shared) {
  constexpr int HEADS = CHANNELS / HEAD;
  const AttendedWay& own = work.own;
  const Span& span = work.span;
  unsigned char *q_tile = shared.tiles[0], *grad_o_tile = shared.tiles[1], *o_tile = shared.tiles[2];
  auto bring_keys = [&](int key, int buffer) {
    work.bring_answering(shared.tiles[4 + 2 * buffer], 0, key, span.window_end);
    work.bring_answering(shared.tiles[5 + 2 * buffer], work.d, key, span.window_end);
    copy_commit();
  };
  work.bring_asking(q_tile, own.q, span.first, span.end);
  work.bring_asking(grad_o_tile, own.grad_o, span.first, span.end);
  work.bring_asking(o_tile, own.o, span.first, span.end);
  copy_commit();
  bring_keys(span.window_begin, 0);
  work.template bring_levels<HEADS>(shared.levels[0], span.first, span.end);
  copy_wait<1>();
  __syncthreads();
  sum_deltas<T, HEAD>(shared.levels[0], o_tile, grad_o_tile);
  __syncthreads();
  const Place place(threadIdx.x);
  const int line = threadIdx.x / 32 * 16;
  const Sight sight(span, line, own.window);
  int low[2];
  window_begins(low, span, place, own.window);
  Queries<T, HEAD> mine[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    left_operand<HEAD>(mine[h].q, shared_address(q_tile), line, h * HEAD, place.lane);
    left_operand<HEAD>(mine[h].grad_o, shared_address(grad_o_tile), line, h * HEAD, place.lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[h].level[r] = shared.levels[0].level[h][place.row + 8 * r];
      mine[h].delta[r] = shared.levels[0].delta[h][place.row + 8 * r];
    }
  }
  for (int key = span.window_begin, buffer = 0; key < span.window_end; key += BLOCK, buffer ^= 1) {
    if (key + BLOCK < span.window_end) {
      bring_keys(key + BLOCK, buffer ^ 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const uint32_t k = shared_address(shared.tiles[4 + 2 * buffer]), v = shared_address(shared.tiles[5 + 2 * buffer]);
    for (int at = 0; at < BLOCK && sight.sees(key + at, 16); at += 16)
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        float p[2][4], dp[2][4];
        mine[h].scores(p, dp, k, v, at, h * HEAD, key + at, sight.sees_all(key + at, 16), low, own.window, work.scale,
                       place);
        mine[h].add(p, dp, k, at, h * HEAD, place.lane);
      }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    T* grad_q = static_cast<T*>(own.grad_q) + work.channel + h * HEAD;
    store_rows<T, HEAD>(grad_q, work.d, mine[h].grad_q, work.grad_scale, span, work.order, own.asking, place);
  }
}

// 64 keys of a longer window: a walk over its queries.
template <class T, int HEAD>
CAST_DEVICE void some_keys(const Work<T>& work, AttentionBackwardShared& shared) {
  constexpr int HEADS = CHANNELS / HEAD;
  const AttendedWay& own = work.own;
  const Span& span = work.span;
  auto bring_queries = [&](int query, int buffer) {
    unsigned char (*to)[TILE_BYTES] = shared.tiles + 2 + 3 * buffer;
    work.bring_asking(to[0], own.q, query, span.window_end);
    work.bring_asking(to[1], own.grad_o, query, span.window_end);
    work.bring_asking(to[2], own.o, query, span.window_end);
    copy_commit();
    work.template bring_levels<HEADS>(shared.levels[buffer], query, span.window_end);
  };
  work.bring_answering(shared.tiles[0], 0, span.first, span.end);
  work.bring_answering(shared.tiles[1], work.d, span.first, span.end);
  bring_queries(span.window_begin, 0);
  const Place place(threadIdx.x);
  const int line = threadIdx.x / 32 * 16;
  const Sight sight(span, line, own.window);
  int low[2];
  window_begins(low, span, place, own.window);
  Keys<T, HEAD> mine[HEADS];
  for (int query = span.window_begin, buffer = 0; query < span.window_end; query += BLOCK, buffer ^= 1) {
    if (query + BLOCK < span.window_end) {
      bring_queries(query + BLOCK, buffer ^ 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    unsigned char (*tiles)[TILE_BYTES] = shared.tiles + 2 + 3 * buffer;
    Levels& levels = shared.levels[buffer];
    sum_deltas<T, HEAD>(levels, tiles[2], tiles[1]);
    if (query == span.window_begin)
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        left_operand<HEAD>(mine[h].k, shared_address(shared.tiles[0]), line, h * HEAD, place.lane);
        left_operand<HEAD>(mine[h].v, shared_address(shared.tiles[1]), line, h * HEAD, place.lane);
      }
    __syncthreads();
    for (int at = 0; at < BLOCK && sight.sees(query + at, 16); at += 16)
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
        mine[h].add(shared_address(tiles[0]), shared_address(tiles[1]), levels.level[h], levels.delta[h], at, h * HEAD,
                    query + at, sight.sees_all(query + at, 16), low, own.window, work.scale, place);
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) store_keys(work, mine[h], h * HEAD, place);
}

template <class T, int HEAD>
CAST_DEVICE void attention_backward(const AttentionBackwardArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  AttentionBackwardShared& shared = *reinterpret_cast<AttentionBackwardShared*>(raw);
  const int d = g.heads * HEAD, groups = d / CHANNELS, channel = blockIdx.x % groups * CHANNELS;
  int tile = blockIdx.x / groups;
  const bool second = tile >= g.ways[0].tiles;
  const AttendedWay& own = g.ways[second];
  if (second) tile -= g.ways[0].tiles;
  const bool whole = own.tiles_of_window == 1;
  const int of_one_kind = g.clips * own.clip_tiles, attending = whole ? of_one_kind : 2 * of_one_kind;
  if (tile >= attending) {
    const int first = (tile - attending) * BLOCK, frames = g.clips * g.frames;
    if (own.asking.cls) zero_cls(static_cast<T*>(own.grad_q) + channel, d, first, frames, own.asking);
    if (own.answering.cls) {
      zero_cls(static_cast<T*>(own.grad_kv) + channel, 2 * d, first, frames, own.answering);
      zero_cls(static_cast<T*>(own.grad_kv) + d + channel, 2 * d, first, frames, own.answering);
    }
    return;
  }
  const Work<T> work(g, own, tile % of_one_kind, HEAD, channel);
  if (whole) {
    whole_windows<T, HEAD>(work, shared);
  } else if (tile < of_one_kind) {
    some_queries<T, HEAD>(work, shared);
  } else {
    some_keys<T, HEAD>(work, shared);
  }
}

}  // namespace

// CTAS: that an SM holds at once, as many as leave the kernel enough registers.
#define CAST_ATTENTION_BACKWARD(NAME, T, HEAD, CTAS) \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, CTAS) \
      NAME(const __grid_constant__ AttentionBackwardArguments g) { \
    attention_backward<T, HEAD>(g); \
  }

CAST_ATTENTION_BACKWARD(bcast_attention_backward_bf16_16, bf16, 16, 2)
CAST_ATTENTION_BACKWARD(bcast_attention_backward_bf16_32, bf16, 32, 3)
CAST_ATTENTION_BACKWARD(bcast_attention_backward_bf16_64, bf16, 64, 3)
CAST_ATTENTION_BACKWARD(bcast_attention_backward_fp16_16, fp16, 16, 2)
CAST_ATTENTION_BACKWARD(bcast_attention_backward_fp16_32, fp16, 32, 3)
CAST_ATTENTION_BACKWARD(bcast_attention_backward_fp16_64, fp16, 64, 3)

}  // namespace cast::cuda
