// out = in + branch, by tiles through shared memory in place: a tile comes in ahead of its use, the branch is added, and
// the tile goes out. Where there is no `in`, out = branch.
#pragma once
#include "rows.cuh"

namespace cast::cuda {

template <class Consumer, class X>
struct Residual {
  static constexpr int COLUMNS = TILE_COLUMNS<X>;
  static constexpr int AHEAD = TILES - 1;  // tiles under way; the last place is still on its way out

  Incoming<Consumer> incoming;
  const TensorMap *in, *out;
  int row;
  Columns columns;
  bool there = true;  // whether there is an `in`

  CAST_DEVICE void ask(int column) {
    if (there && column < columns.end) incoming.ask(in, column, row);
  }

  // After all threads are through with what lay in the tiles before.
  CAST_DEVICE void begin() {
    if (incoming.consumer.thread == 0)
      for (int i = 0; i < AHEAD; ++i) ask(columns.first + i * COLUMNS);
  }

  template <class Do>
  CAST_DEVICE static void each(Do what) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) what(j, r);
  }

  // The next tile, which begins at `column`. `value(j, r)` is the branch's pair of its eight columns j, row r.
  template <class Value>
  CAST_DEVICE void add(int column, Value value) {
    Consumer& consumer = incoming.consumer;
    const int at = incoming.used % TILES;
    const uint32_t tile = shared_address(consumer.shared.tiles[at]);
    if (there) {
      incoming.wait();
    } else {
      ++incoming.used;
      each([&](int j, int r) { store_pair(tile, consumer.place, j, r, as_pair<X>(0.f, 0.f)); });
    }
    each([&](int j, int r) {
      const float2 old = load_pair<X>(tile, consumer.place, j, r), branch = value(j, r);
      store_pair(tile, consumer.place, j, r, as_pair<X>(old.x + branch.x, old.y + branch.y));
    });
    fence_proxy_async();
    consumer.meet();
    if (consumer.thread == 0) {
      store_tile(out, consumer.shared.tiles[at], column, row);
      store_commit();
      store_wait_read<1>();  // the tile before has left: another may come there, or be written after the next meeting
      ask(column + AHEAD * COLUMNS);
    }
  }
};

}  // namespace cast::cuda
