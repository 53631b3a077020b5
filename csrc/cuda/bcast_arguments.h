// What the kernels of B-CAST are given. A stream is spatial or temporal; a way is t2s or s2t, asked by one stream and
// answered by the other. Rows of a stream are its tokens, frame by frame, CLS first in each frame where it has one.
#pragma once
#include "arguments.h"

namespace cast::cuda {

// The tokens of one stream.
struct Tokens {
  int frame_rows;  // of a frame, CLS among them
  int cls;         // rows of a frame before its patches: 1 or 0
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
  const float* q_table;     // [positions, d]: (beta + position) Wq' + bias
  const float* kv_table;    // [positions, 2d]
  float* rstd;              // [rows], written
  Steps q_steps, kv_steps;  // where in its table a row stands
  Tokens tokens;
  int rows, ctas;
  int q_columns, kv_columns;  // d and 2d, or 0 for a role that the stream does not have
};

struct ProjectArguments {
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
  int by_patch;         // whether windows hold the frames of a patch, not the patches of frames
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
  int rows, ctas;
};

struct ExchangeArguments {
  AskingStream streams[2];
  int frames;  // of a clip
  int dim;
  int keep_h;
};

// ---- prepare: weights as the other kernels read them ----

struct Matrix {
  const void* from;   // [rows, columns]
  void* to;           // [rows, columns] in the compute dtype
  const void* gamma;  // [columns]: each column is multiplied by it; null: a copy
  int rows, columns;
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
  float* to;              // [length, width]
  int length, width;
  int first_cta;
};

constexpr int MATRICES = 10, VECTORS = 10, TABLES = 4;

struct PrepareArguments {
  Matrix matrices[MATRICES];
  Vector vectors[VECTORS];
  Table tables[TABLES];
  int matrix_count, vector_count, table_count;
  int vector_cta, table_cta;  // the first CTA of the vectors, one each, and of the tables
  int channels;               // d
};

}  // namespace cast::cuda
