// The rows of a task: blocks of consecutive rows of a stream, and blocks of queries of a direction.
#pragma once

#include "gemm.h"
#include "problem.h"

CAST_ISA_BEGIN

// Consecutive rows of one clip, in the stream's own order.
struct RowBlock {
  i64 clip, first, rows;
};
CAST_INLINE i64 row_blocks_per_clip(const Problem& p, int stream) { return ceil_div(clip_rows(p, stream), kRowBlock); }
CAST_INLINE RowBlock row_block(const Problem& p, int stream, i64 task) {
  const i64 blocks = row_blocks_per_clip(p, stream), first = task % blocks * kRowBlock;
  return {task / blocks, first, min_of(kRowBlock, clip_rows(p, stream) - first)};
}

// A row of a stream: its frame and patch, or patch -1 for CLS.
struct Token {
  i64 t, n;
};
CAST_INLINE Token token_at(const Problem& p, int stream, i64 row) {
  const i64 per_frame = frame_rows(p, stream);
  return {row / per_frame, row % per_frame - (stream == kSpatial ? 1 : 0)};
}
// The stream's row, within a clip, of patch token index t * N + n.
CAST_INLINE i64 row_of(const Problem& p, int stream, i64 token) {
  return token + (stream == kSpatial ? token / p.patches + 1 : 0);
}

// The cut of a direction's queries into tasks: several whole windows, or a part of one.
struct QueryCut {
  i64 groups_per_task, queries_per_block, blocks_per_group, tasks_per_clip, max_rows;
};
CAST_INLINE QueryCut query_cut(const Problem& p, int direction) {
  const i64 window = window_length(p, direction), groups = window_groups(p, direction);
  QueryCut cut;
  if (window <= kRowBlock) {
    cut.groups_per_task = min_of(kRowBlock / window, groups);
    cut.queries_per_block = window;
    cut.blocks_per_group = 1;
    cut.tasks_per_clip = ceil_div(groups, cut.groups_per_task);
  } else {
    // Equal blocks of whole row tiles, so that no block is left nearly empty.
    cut.groups_per_task = 1;
    cut.queries_per_block = round_up(ceil_div(window, ceil_div(window, kRowBlock)), kTileRows);
    cut.blocks_per_group = ceil_div(window, cut.queries_per_block);
    cut.tasks_per_clip = groups * cut.blocks_per_group;
  }
  cut.max_rows = cut.groups_per_task * cut.queries_per_block;
  return cut;
}

struct QueryBlock {
  i64 clip, first_group, groups, first_index, indices;
};
CAST_INLINE QueryBlock query_block(const Problem& p, int direction, const QueryCut& cut, i64 task) {
  const i64 clip = task / cut.tasks_per_clip, local = task % cut.tasks_per_clip;
  const i64 group = local / cut.blocks_per_group * cut.groups_per_task;
  const i64 index = local % cut.blocks_per_group * cut.queries_per_block;
  return {clip, group, min_of(cut.groups_per_task, window_groups(p, direction) - group), index,
          min_of(cut.queries_per_block, window_length(p, direction) - index)};
}

// Offsets in [group][head][index][head_dim]: of a slot in head 0, and of a head's matrix.
CAST_INLINE i64 slot_offset(const Problem& p, int direction, Slot slot) {
  return (slot.group * p.heads * window_length(p, direction) + slot.index) * head_dim(p);
}
CAST_INLINE i64 head_matrix(const Problem& p, int direction, i64 group, i64 head) {
  return (group * p.heads + head) * window_length(p, direction) * head_dim(p);
}

// Stores a part of a row to a head-major matrix: by vectors if it lies inside one head, else float by float.
struct HeadMajorRow {
  i64 head_dim, head_stride;  // head_stride: floats between the same row of two heads
  template <int C>
  CAST_INLINE void put(float* base, i64 column, const vec (&row)[C], i64 lanes) const {
    const i64 head = column / head_dim, inside = column % head_dim;
    if (inside + lanes <= head_dim) return store_row(base + head * head_stride + inside, row, lanes);
    each(row, lanes, [this, base, column](i64 c, vec v, i64 n) {
      float values[kLanes];
      store(values, v);
      for (i64 i = 0; i < n; ++i) {
        const i64 at = column + c + i;
        base[at / head_dim * head_stride + at % head_dim] = values[i];
      }
    });
  }
  CAST_INLINE void prefetch(const float* base, i64 column) const {
    __builtin_prefetch(base + column / head_dim * head_stride + column % head_dim, 1, 3);
  }
};
CAST_INLINE HeadMajorRow head_major_row(const Problem& p, int direction) {
  return {head_dim(p), window_length(p, direction) * head_dim(p)};
}

// The factor of a token's branch; n is -1 for CLS.
CAST_INLINE float branch_scale(const Problem& p, const float* const scale[2], int stream, i64 clip, i64 n) {
  if (!scale[stream]) return 1.0f;
  return scale[stream][stream == kSpatial ? clip * (p.patches + 1) + n + 1 : clip];
}

CAST_ISA_END
