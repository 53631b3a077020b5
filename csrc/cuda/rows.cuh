// What the row kernels share. A CTA owns 64 rows of a stream. It narrows a wide row to d channels in registers, does
// what needs the whole row, and widens the result again:
//
//     z[64, d] = in[64, K] W'      K in steps of 64, all d columns at once: `narrow`
//     out[64, N] = a[64, d] V'     N in chunks of 192 columns, a in registers:  `widen`
//
// Warpgroup 0 has a thread that fills rings by copies and a warp that tells the cluster what was read; warpgroup 1
// multiplies. Four CTAs of a cluster read the same weights: each loads a quarter of every unit of 192 x 64 and multicasts
// it. Two CTAs share a multiprocessor, so one multiplies while the other is in its epilogue: 2 x (107,520 + 1,024
// reserved) of 233,472 bytes.
#pragma once
#include "ring.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

namespace cast::cuda {

constexpr int CLUSTER = 4, THREADS = 256, CONSUMERS = 128;
// A unit: what one visit to the ring of weights brings.
constexpr int STEP = 64, UNIT_BYTES = PRODUCT_COLUMNS * LINE_BYTES, QUARTER = PRODUCT_COLUMNS / CLUSTER;
constexpr int WEIGHT_PLACES = 3, TILES = 4;
// Registers of a thread: 128 x (32 + 224) x 2 CTAs are all 65,536.
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 224;

// Places for 64 columns of rows that come in: all tiles, or of float32 one, whose two tiles are rounded into a third or a
// fourth.
template <class In>
constexpr int ROW_PLACES = sizeof(In) == 2 ? TILES : 1;
template <class In>
constexpr int PLACE_TILES = sizeof(In) / 2;

template <class In>
struct alignas(1024) RowShared {
  unsigned char weights[WEIGHT_PLACES][UNIT_BYTES];
  unsigned char tiles[TILES][TILE_BYTES];  // rows that come in; afterwards results on their way out
  ClusterRingBarriers<WEIGHT_PLACES, CLUSTER> weight_ring;
  RingBarriers<ROW_PLACES<In>> row_ring;
  uint64_t incoming[TILES];

  // By one thread, before the cluster meets.
  CAST_DEVICE void init() {
    weight_ring.init(1);
    row_ring.init(CONSUMERS / 32);
    for (uint64_t& barrier : incoming) mbarrier_init(&barrier, 1);
    fence_mbarrier_init();
  }
};

static_assert(sizeof(RowShared<float>) == ROW_SHARED && sizeof(RowShared<bf16>) == ROW_SHARED,
              "what the host asks for");

// Columns of a product, from `first` to `end`.
struct Columns {
  int first, end;

  // Of these the ones of a part that begins at `begin` and has `size` columns, counted from there.
  CAST_DEVICE Columns within(int begin, int size) const {
    return {min(max(first - begin, 0), size), min(max(end - begin, 0), size)};
  }
};

// What a CTA computes: 64 rows of a stream with all columns of the last product, or with a share of them. The CTAs of a
// cluster have the same share, since they read the same weights. All that share rows narrow them, by the same
// instructions: no bit depends on who computes a column. What is not a column's, the first one stores.
template <class Stream>
struct Task {
  const Stream& own;
  int row, share, shares;

  CAST_DEVICE explicit Task(const Stream (&streams)[2]) : own(streams[blockIdx.x >= streams[0].tiles.ctas]) {
    const RowTiles& tiles = own.tiles;
    const int cta = blockIdx.x - (&own == streams ? 0 : streams[0].tiles.ctas), behind = cta - tiles.whole;
    shares = behind < 0 ? 1 : tiles.shares;
    share = behind < 0 ? 0 : behind / CLUSTER % shares;
    row = TILE_ROWS * (behind < 0 ? cta : tiles.whole + behind / CLUSTER / shares * CLUSTER + behind % CLUSTER);
  }

  CAST_DEVICE bool stores_rows() const { return share == 0; }

  // Its part of so many columns of the last product, in whole units.
  CAST_DEVICE Columns columns(int all) const {
    const int units = (all + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS;
    return {units * share / shares * PRODUCT_COLUMNS, min(units * (share + 1) / shares * PRODUCT_COLUMNS, all)};
  }
};

// Units of `narrow` and `widen`.
CAST_DEVICE int narrow_units(int columns, int chunks) { return (columns + STEP - 1) / STEP * chunks; }
CAST_DEVICE int widen_units(Columns columns, int channels) {
  return (columns.end - columns.first + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS * (channels / STEP);
}

// The thread that fills the rings. It must ask for the same units, in the same order, as the consumers.
template <class In>
struct Producer {
  RowShared<In>& shared;
  uint32_t rank = cluster_rank();
  RingCursor<WEIGHT_PLACES> weights{};
  RingCursor<ROW_PLACES<In>> rows{};

  // in [rows, K], weight [d, K]
  CAST_DEVICE void narrow(const TensorMap* in, const TensorMap* weight, int row, int columns, int chunks) {
    for (int k = 0; k < columns; k += STEP) {
      rows.wait_empty(shared.row_ring);
      unsigned char* to = shared.tiles[rows.place * PLACE_TILES<In>];
      mbarrier_expect(&shared.row_ring.full[rows.place], PLACE_TILES<In> * TILE_BYTES);
      load_tile(to, in, &shared.row_ring.full[rows.place], k, row);
      if (sizeof(In) == 4) load_tile(to + TILE_BYTES, in, &shared.row_ring.full[rows.place], k + TILE_COLUMNS<In>, row);
      rows.next();
      for (int chunk = 0; chunk < chunks; ++chunk) unit(weight, k, chunk * PRODUCT_COLUMNS);
    }
  }

  // in [rows, channels], for `take`
  CAST_DEVICE void give(const TensorMap* in, int row, int channels) {
    for (int k = 0; k < channels; k += STEP) {
      rows.wait_empty(shared.row_ring);
      mbarrier_expect(&shared.row_ring.full[rows.place], TILE_BYTES);
      load_tile(shared.tiles[rows.place], in, &shared.row_ring.full[rows.place], k, row);
      rows.next();
    }
  }

  // weight [N, d]
  CAST_DEVICE void widen(const TensorMap* weight, Columns columns, int channels) {
    for (int column = columns.first; column < columns.end; column += PRODUCT_COLUMNS)
      for (int k = 0; k < channels; k += STEP) unit(weight, k, column);
  }

  // This CTA's quarter of a unit, to all CTAs of the cluster, once all of them have read what lies there.
  CAST_DEVICE void unit(const TensorMap* weight, int k, int row) {
    weights.wait_empty(shared.weight_ring);
    uint64_t* full = &shared.weight_ring.full[weights.place];
    mbarrier_expect(full, UNIT_BYTES);
    unsigned char* to = shared.weights[weights.place] + rank * (UNIT_BYTES / CLUSTER);
    load_tile_multicast(to, weight, full, k, row + static_cast<int>(rank) * QUARTER, (1 << CLUSTER) - 1);
    weights.next();
  }
};

// The warpgroup that multiplies. T: what products read; D: channels of the bottleneck.
template <class T, class In, int D>
struct Consumer {
  static_assert(D % PRODUCT_COLUMNS == 0 && D % STEP == 0, "whole chunks and whole steps");
  static constexpr int CHUNKS = D / PRODUCT_COLUMNS;
  using Wide = float[CHUNKS][PRODUCT_COLUMNS / 2];  // a row's d channels as accumulators, see `product`
  using Narrow = uint32_t[D / 4];  // the same as operand, two in a register

  RowShared<In>& shared;
  int thread = threadIdx.x % CONSUMERS;
  Place place{thread};
  RingCursor<WEIGHT_PLACES> weights{};
  RingCursor<ROW_PLACES<In>> rows{};
  int tile = 0;  // where the next result goes

  // z = the bias of each column.
  CAST_DEVICE void begin_with(Wide& z, const float* bias) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float2 both = *reinterpret_cast<const float2*>(bias + 8 * j + place.column);
      float* to = z[j / (PRODUCT_COLUMNS / 8)] + j % (PRODUCT_COLUMNS / 8) * 4;
      to[0] = to[2] = both.x;
      to[1] = to[3] = both.y;
    }
  }

  // acc += a W', one unit.
  CAST_DEVICE void unit(float (&acc)[PRODUCT_COLUMNS / 2], const uint32_t* a) {
    weights.wait_full(shared.weight_ring);
    const uint64_t weight = rows_along_k(shared.weights[weights.place]);
    products_begin();
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) product<T>(acc, a + 4 * k, weight + 2 * k);
    products_commit();
    products_wait<0>();
    free_unit();
  }

  CAST_DEVICE void free_unit() {
    if (thread == 0) mbarrier_arrive(&shared.weight_ring.read[weights.place]);
    weights.next();
  }

  // z += in W', K columns. Rows of float32 are rounded, and go to `copy` as well where it is given.
  CAST_DEVICE void narrow(Wide& z, int columns, const TensorMap* copy = nullptr, int row = 0) {
    for (int k = 0; k < columns; k += STEP) {
      rows.wait_full(shared.row_ring);
      const unsigned char* from = shared.tiles[rows.place * PLACE_TILES<In>];
      if constexpr (sizeof(In) == 4) {
        unsigned char* rounded = shared.tiles[2 + k / STEP % 2];
        round_tile<T>(shared_address(rounded), shared_address(from), place);
        free_rows();
        fence_proxy_async();
        if (thread == 0) store_wait_read<0>();  // of the other tile, which is written next
        meet();  // and every warp is through with the products of the step before, which read the other tile
        if (copy != nullptr && thread == 0) {
          store_tile(copy, rounded, k, row);
          store_commit();
        }
        from = rounded;
      }
      wait_units();
      RingCursor<WEIGHT_PLACES> at = weights;
      products_begin();
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk, at.next())
#pragma unroll
        for (int i = 0; i < STEP / 16; ++i)
          product<T>(z[chunk], rows_along_k(from) + 2 * i, rows_along_k(shared.weights[at.place]) + 2 * i);
      products_commit();
      products_wait<0>();
      if (sizeof(In) == 2) free_rows();
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) free_unit();
    }
  }

  CAST_DEVICE void wait_units() {
    RingCursor<WEIGHT_PLACES> at = weights;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk, at.next()) at.wait_full(shared.weight_ring);
  }

  CAST_DEVICE void free_rows() {
    __syncwarp();
    if (place.lane == 0) mbarrier_arrive(&shared.row_ring.empty[rows.place]);
    rows.next();
  }

  // acc += a V', one chunk of columns.
  CAST_DEVICE void widen(float (&acc)[PRODUCT_COLUMNS / 2], const Narrow& a) {
#pragma unroll
    for (int k = 0; k < D / STEP; ++k) unit(acc, a + 16 * k);
  }

  // a = d channels of rows that come in.
  CAST_DEVICE void take(Narrow& a) {
#pragma unroll
    for (int k = 0; k < D / STEP; ++k) {
      rows.wait_full(shared.row_ring);
      load_fragments(a + 16 * k, shared_address(shared.tiles[rows.place]), thread / 32, place);
      free_rows();
    }
  }

  CAST_DEVICE void meet() { named_barrier(1, CONSUMERS); }

  // Store TILE_COLUMNS of accumulators as R, from `column` on. `value(j, r)` is the pair of
  // eight columns j, row r, as the tile holds it.
  template <class R, class Value>
  CAST_DEVICE void put(const TensorMap* out, int column, int row, Value value) {
    if (thread == 0) store_wait_read<TILES - 1>();
    meet();
    const uint32_t to = shared_address(shared.tiles[tile]);
#pragma unroll
    for (int j = 0; j < TILE_COLUMNS<R> / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) store_pair(to, place, j, r, value(j, r));
    send(out, column, row);
  }

  // Store a chunk of accumulators as T, from `column` on.
  CAST_DEVICE void put_chunk(const TensorMap* out, int column, int row, const float (&acc)[PRODUCT_COLUMNS / 2]) {
#pragma unroll
    for (int part = 0; part < PRODUCT_COLUMNS / TILE_COLUMNS<T>; ++part)
      put<T>(out, column + part * TILE_COLUMNS<T>, row, [&](int j, int r) {
        const float* v = acc + part * TILE_COLUMNS<T> / 2 + 4 * j + 2 * r;
        return as_pair<T>(v[0], v[1]);
      });
  }

  // Store a row's d channels.
  CAST_DEVICE void put_row(const TensorMap* out, int row, const Narrow& a) {
#pragma unroll
    for (int part = 0; part < D / TILE_COLUMNS<T>; ++part)
      put<T>(out, part * TILE_COLUMNS<T>, row, [&](int j, int r) { return a[part * TILE_COLUMNS<T> / 4 + 2 * j + r]; });
  }

  // a = z, rounded.
  CAST_DEVICE static void pack_row(Narrow& a, const Wide& z) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
      const float* v = z[i / (PRODUCT_COLUMNS / 4)] + 2 * (i % (PRODUCT_COLUMNS / 4));
      a[i] = pack<T>(v[0], v[1]);
    }
  }

  // Let the tile that all threads have written go to global memory.
  CAST_DEVICE void send(const TensorMap* out, int column, int row) {
    fence_proxy_async();
    meet();
    if (thread == 0) {
      store_tile(out, shared.tiles[tile], column, row);
      store_commit();
    }
    tile = (tile + 1) % TILES;
  }
};

// The factors of a thread's two rows, `row` and the eighth after it, in a stream with `scale`; frames: of a clip.
template <class Stream>
CAST_DEVICE void drop_path(float (&factor)[2], const Stream& own, int frames, int row) {
  factor[0] = factor[1] = 1.f;
  if (own.scale == nullptr) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = min(row + 8 * r, own.rows - 1), frame = at / own.tokens.frame_rows;
    factor[r] = own.scale[frame / frames * own.scale_of_clip + at % own.tokens.frame_rows * own.scale_of_token];
  }
}

// Tiles that come in after `narrow`, each asked for by thread 0 some steps ahead of its use, to the tiles in turn.
template <class Consumer>
struct Incoming {
  Consumer& consumer;
  int asked = 0, used = 0;

  // By thread 0, once nothing else is read from or written to the place.
  CAST_DEVICE void ask(const TensorMap* in, int column, int row) {
    uint64_t* barrier = &consumer.shared.incoming[asked % TILES];
    mbarrier_expect(barrier, TILE_BYTES);
    load_tile(consumer.shared.tiles[asked % TILES], in, barrier, column, row);
    ++asked;
  }

  // The next tile, as an address of shared memory.
  CAST_DEVICE uint32_t wait(Source source = CAST_CALLER) {
    const int at = used % TILES;
    cuda::wait(&consumer.shared.incoming[at], used / TILES % 2, Awaited::incoming, at, source);
    ++used;
    return shared_address(consumer.shared.tiles[at]);
  }
};

}  // namespace cast::cuda
