// out = in + branch, by tiles through shared memory in place: a tile comes in ahead of its use, the branch is added, and
// the tile goes out.
#pragma once
#include "rows.cuh"

namespace cast::cuda {

template <class Consumer, class X>
struct Residual {
  static constexpr int COLUMNS = TILE_COLUMNS<X>;
  static constexpr int AHEAD = TILES - 1;  // tiles under way; the last place is still on its way out

  Incoming<Consumer, TILES> incoming;
  const TensorMap *in, *out;
  int row, columns;
  int asked = 0, added = 0;  // columns

  CAST_DEVICE void ask() {
    if (asked < columns) incoming.ask(in, asked, row);
    asked += COLUMNS;
  }

  // After all threads are through with what lay in the tiles before.
  CAST_DEVICE void begin() {
    if (incoming.consumer.thread == 0)
      for (int i = 0; i < AHEAD; ++i) ask();
  }

  // `value(j, r)` is the branch's pair of eight columns j, row r of the next tile.
  template <class Value>
  CAST_DEVICE void add(Value value) {
    Consumer& consumer = incoming.consumer;
    const int at = incoming.used % TILES;
    const uint32_t tile = incoming.wait();
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 old = load_pair<X>(tile, consumer.place, j, r), branch = value(j, r);
        store_pair(tile, consumer.place, j, r, as_pair<X>(old.x + branch.x, old.y + branch.y));
      }
    fence_proxy_async();
    consumer.meet();
    if (consumer.thread == 0) {
      store_tile(out, consumer.shared.tiles[at], added, row);
      store_commit();
      store_wait_read<1>();  // the tile before has left: another may come there
      ask();
    }
    added += COLUMNS;
  }
};

}  // namespace cast::cuda
