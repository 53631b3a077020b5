// What the kernels of B-CAST are given. A stream is spatial or temporal; a way is t2s or s2t, asked by one stream and
// answered by the other. Rows of a stream are its tokens, frame by frame, CLS first in each frame where it has one.
#pragma once
#include "arguments.h"
#include "watchdog.h"

namespace cast::cuda {

constexpr int TABLES = 4;  // of positions: queries' and answers', both ways

// The tokens of one stream.
struct Tokens {
  int frame_rows;  // of a frame, CLS among them
  int cls;         // rows of a frame before its patches: 1 or 0
};

// The CTAs of a row kernel that have a stream's rows, 64 each. The first `whole` compute all columns; the rows of each
// behind them are `shares` CTAs', which share the columns of the last product.
struct RowTiles {
  int ctas, whole, shares;
};

// Position in the window = frame * by_frame + patch * by_patch.
struct Steps {
  int by_frame, by_patch;
};

// ---- project: x -> xhat, Q, K, V ----

struct ProjectedStream {
  TensorMap x;              // [rows, DIM]
  TensorMap down;           // [d, DIM]
  TensorMap q_weight;       // [d, d], its columns times gamma
  TensorMap kv_weight;      // [2d, d], the same
  TensorMap xhat;           // [rows, d], written
  TensorMap q;              // [rows, d], written
  TensorMap kv;             // [rows, 2d], written: keys first
  const float* down_bias;   // [d]
  const void* q_table;      // [positions, d]: (beta + position) Wq' + bias, in the compute dtype
  const void* kv_table;     // [positions, 2d], the same
  float* rstd;              // [rows], written
  Steps q_steps, kv_steps;  // where in its table a row stands
  Tokens tokens;
  RowTiles tiles;
  int rows;
  int q_columns, kv_columns;  // d and 2d, or 0 for a role that the stream does not have
};

struct ProjectArguments : Watched {
  ProjectedStream streams[2];  // spatial first
  int frames;                  // of a clip
  int dim;
  float eps;
};

// ---- attention: Q, K, V -> O, log-sum-exp ----

struct AttentionWay {
  const void* q;   // [asking rows, d]
  const void* kv;  // [answering rows, 2d]
  void* o;         // [asking rows, d], written; zero for CLS
  float* lse;      // [asking rows, heads] in base 2, written; may be null
  Tokens asking, answering;
  int in_time;          // 1 where windows hold the frames of a patch, not the patches of frames
  int window;           // tokens of a window
  int tile_queries;     // of a CTA: whole windows, or 64 of one
  int tiles_of_window;  // 1 where a tile holds whole windows
  int clip_tiles;       // tiles of a clip
  int tiles;            // all of them, those that zero O of CLS last
};

struct AttentionArguments {
  AttentionWay ways[2];  // the one with longer windows first
  int clips, frames, patches;
  int heads;
  float scale;  // of scores, times log2(e)
};

// ---- exchange: O, x -> h, y ----

struct AskingStream {
  TensorMap o;              // [rows, d]
  TensorMap proj;           // [d, d]
  TensorMap up;             // [DIM, d]
  TensorMap x;              // [rows, DIM]
  TensorMap y;              // [rows, DIM], written
  TensorMap h;              // [rows, d], written where `keep_h`
  const float* proj_bias;   // [d]
  const float* up_bias;     // [DIM]
  const float* norm;        // gamma [d], for CLS
  const float* norm_bias;   // beta [d]
  const void* xhat;         // [rows, d]
  const float* scale;       // [clips, tokens of a frame] or [clips]; null: 1
  int scale_of_clip, scale_of_token;  // its strides
  Tokens tokens;
  RowTiles tiles;
  int rows;
};

struct ExchangeArguments : Watched {
  AskingStream streams[2];
  int frames;  // of a clip
  int dim;
  int keep_h, only_h;  // whether h is stored; whether that is all
};

// ---- exchange_backward: dY, h -> f gelu(h), dh, dO ----

struct AskedStream {
  TensorMap grad_y;          // [rows, DIM]
  TensorMap rounded_grad_y;  // [rows, DIM] in the compute dtype, written where it is not grad_y itself
  TensorMap up;              // [d, DIM], transposed
  TensorMap proj;            // [d, d], transposed
  TensorMap h;               // [rows, d]
  TensorMap g;               // [rows, d], written: f gelu(h)
  TensorMap dh;              // [rows, d], written
  TensorMap grad_o;          // [rows, d], written; of CLS nobody reads it
  const float* scale;        // as in AskingStream
  int scale_of_clip, scale_of_token;
  Tokens tokens;
  RowTiles tiles;
  int rows;
};

struct ExchangeBackwardArguments : Watched {
  AskedStream streams[2];
  int frames;
  int dim;
};

// ---- attention_backward: Q, K, V, dO, log-sum-exp -> dQ, dK, dV ----

struct AttendedWay {
  const void* q;        // [asking rows, d]
  const void* kv;       // [answering rows, 2d]
  const void* o;        // [asking rows, d]
  const void* grad_o;   // [asking rows, d]
  const float* lse;     // [asking rows, heads] in base 2
  void* grad_q;         // [asking rows, d], written; zero for CLS
  void* grad_kv;        // [answering rows, 2d], written; zero for CLS
  Tokens asking, answering;
  int in_time, window, tile_queries, tiles_of_window, clip_tiles, tiles;  // as in AttentionWay
};

struct AttentionBackwardArguments {
  AttendedWay ways[2];
  int clips, frames, patches;
  int heads;
  float scale;       // of scores, times log2(e)
  float grad_scale;  // of scores
};

// ---- project_backward: dQ, dK, dV, dh of CLS -> dz, dX ----

struct ProjectedBackStream {
  TensorMap grad_q;     // [rows, d]
  TensorMap grad_kv;    // [rows, 2d]
  TensorMap q_weight;   // [d, d], its columns times gamma, transposed
  TensorMap kv_weight;  // [d, 2d], the same
  TensorMap xhat;       // [rows, d]
  TensorMap down;       // [DIM, d], transposed
  TensorMap dz;         // [rows, d], written
  TensorMap grad_y;     // [rows, DIM], added to dX where the stream received something
  TensorMap grad_x;     // [rows, DIM], written
  const float* rstd;    // [rows]
  const float* norm;    // gamma [d]
  const void* dh;       // [rows, d], read for CLS; null where the stream receives nothing
  Tokens tokens;
  RowTiles tiles;
  int rows;
  int q_channels, kv_channels;  // d and 2d, or 0
  int received;                 // whether grad_y is there
};

struct ProjectBackwardArguments : Watched {
  ProjectedBackStream streams[2];
  int dim;
  int want_x;
};

// ---- weight_gradient: products over rows, in parts ----

// What a row counts in the sums of a left operand's columns.
enum RowFactor { ONES, NOT_CLS, SCALE };

// left' right [m, n], and sums over the rows of left [m]. A pair is 256 x d of it, for a cluster of two CTAs.
struct GradientJob {
  TensorMap left;      // [rows, m]
  TensorMap right;     // [rows, n]
  const float* scale;  // as in AskingStream, for SCALE
  int scale_of_clip, scale_of_token;
  Tokens tokens;
  int rows, m;
  int m_pairs;                 // of the matrix's rows; pairs of the first d columns come first
  int first_pair, first_step;  // of all jobs' pairs, and of their steps of 64 rows
  int steps;                   // of a pair
  int factor;                  // a RowFactor
};

constexpr int GRADIENT_JOBS = 10, PAIR_ROWS = 256;

struct WeightGradientArguments : Watched {
  GradientJob jobs[GRADIENT_JOBS];
  float* parts;  // [pairs + clusters - 1, 256, d]: cluster c's part of pair p is p + c
  float* sums;   // [pairs + clusters - 1, 256]
  int count, steps, frames;
};

// ---- position_sums: dQ and dKV by position ----

struct PositionSum {
  const void* from;  // [rows, width]
  float* to;         // [splits, length, width]
  Tokens tokens;
  int in_time;  // 1 where a position is a frame; else it is a patch, or both
  int width, length, splits;
  int first_cta;
};

struct PositionSumsArguments {
  PositionSum tables[TABLES];
  int count, clips, frames, patches;
};

// ---- finish: gradients of parameters from parts ----

// A job's parts: cluster c of `clusters` has the steps from all * c / clusters on, see weight_gradient.
struct Parts {
  int first_pair, first_step, steps, m_pairs;
};

// A layer's weight and bias.
struct WeightOut {
  void* weight;  // [m, n], written; may be null
  void* bias;    // [m], written; may be null
  Parts parts;
  // Of a projection whose input was xhat: weight = (parts) diag(gamma) + sums beta' + position sums' positions.
  const float* norm;       // [n] or null
  const float* norm_bias;  // [n]
  const void* positions;   // [length, n] or null
  const float* position_sums;  // [splits, length, m]
  int length, splits;
  int m, n;
  int first_cta;
};

// A table's gradient: position sums times the projection's weight.
struct TableOut {
  void* to;            // [length, n], written
  const float* sums;   // [splits, length, m]
  const void* weight;  // [m, n]
  int length, splits, m, n;
  int first_cta;
};

// gamma's and beta's gradients: of each projection of the stream's rows the column sums of W o (dY' xhat) and sums W, and
// what CLS adds.
struct NormOut {
  void *norm, *norm_bias;  // [n], written; may be null
  const void* weights[2];  // [m, n]; null where the stream lacks the role
  Parts parts[2];
  int m[2];
  const void *dh, *xhat;  // [rows, n]; null where the stream has no CLS that receives
  Tokens tokens;
  int all_frames;
  int n;
  int first_cta;
};

constexpr int NORMS = 2;

struct FinishArguments {
  WeightOut weights[GRADIENT_JOBS];
  TableOut tables[TABLES];
  NormOut norms[NORMS];
  const float *parts, *sums;  // of weight_gradient
  int weight_count, table_count, norm_count;
  int table_cta, norm_cta;
  int channels, clusters, steps;
};

// ---- prepare: weights as the other kernels read them ----

struct Matrix {
  const void* from;   // [rows, columns]
  void* to;           // [rows, columns] or transposed, in the compute dtype
  const void* gamma;  // [columns]: each column is multiplied by it; null: a copy
  int rows, columns;
  int transposed;
  int wide;  // whether `from` is float32: a stream may be where parameters are not
  int first_cta;
};

struct Vector {
  const void* from;  // [size]
  float* to;         // [size]
  int size;
};

struct Table {
  const void* weight;     // [width, d]
  const void* bias;       // [width]
  const void* beta;       // [d]
  const void* positions;  // [length, d] or null
  void* to;               // [length, width], in the compute dtype
  int length, width;
  int first_cta;
};

constexpr int MATRICES = 20, VECTORS = 10;

struct PrepareArguments {
  Matrix matrices[MATRICES];
  Vector vectors[VECTORS];
  Table tables[TABLES];
  int matrix_count, vector_count, table_count;
  int vector_cta, table_cta;  // the first CTA of the vectors, one each, and of the tables
  int channels;               // d
};

}  // namespace cast::cuda
