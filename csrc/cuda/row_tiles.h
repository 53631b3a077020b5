// How a row kernel's tiles of 64 rows are laid over CTAs: the decision, by arithmetic alone.
//
// Tiles go to multiprocessors in rounds, a CTA each: the second CTA of a multiprocessor hides the waits of the first and
// shares its tensor cores. Those that fill no round leave most of the multiprocessors without work. If so many `shares`
// of the last product's columns have CTAs of their own, which all narrow the rows again, that round ends after
//
//     rounds(tiles * shares) * (narrow + units / shares * unit)      steps of the ring, 64 x 192 weights for 64 rows
//
// and the least number of shares that ends first is taken. It changes no bit of a result.
#pragma once
#include <algorithm>
#include <array>

#include "bcast_arguments.h"

namespace cast::cuda {

constexpr int ROW_CLUSTER = 4;

// One launch of a row kernel. A stream without rows takes no part.
struct RowWork {
  std::array<int, 2> tiles;  // of each stream
  std::array<int, 2> units;  // chunks of columns of its last product
  int narrow;  // steps of a tile before that
  int unit;  // steps of a chunk
};

inline int rounded_up(int number, int of) { return (number + of - 1) / of; }

// Steps until `clusters` of tiles are done, each in so many shares, by so many clusters at once.
inline int last_round(const RowWork& work, int clusters, int shares, int at_once) {
  const int units = std::max(work.units[0], work.units[1]);
  return rounded_up(clusters * shares, at_once) * (work.narrow + rounded_up(units, shares) * work.unit);
}

inline std::array<RowTiles, 2> row_tiles(const RowWork& work, int multiprocessors) {
  const int at_once = std::max(1, multiprocessors / ROW_CLUSTER);
  const int clusters[2] = {rounded_up(work.tiles[0], ROW_CLUSTER), rounded_up(work.tiles[1], ROW_CLUSTER)};
  const int all = clusters[0] + clusters[1], left = all % at_once;
  int shares = 1;
  for (int more = 2; more <= std::max(work.units[0], work.units[1]); ++more)
    if (last_round(work, left, more, at_once) < last_round(work, left, shares, at_once)) shares = more;
  std::array<RowTiles, 2> streams;
  int full = shares == 1 ? all : all - left;
  for (int s = 0; s < 2; ++s) {
    const int whole = std::min(full, clusters[s]), own = std::clamp(work.units[s], 1, shares);
    full -= whole;
    streams[s] = {(whole + (clusters[s] - whole) * own) * ROW_CLUSTER, whole * ROW_CLUSTER, own};
  }
  return streams;
}

}  // namespace cast::cuda
