// The backward of one call: what its kernels leave for each other, and its launches.
#pragma once
#include "bcast_draft.h"

namespace cast::cuda {

// So many members of a position one CTA of `position_sums` adds, more where there were more shares than so many: `finish`
// reads them one behind the other.
constexpr int SUM_MEMBERS = 64, MOST_SPLITS = 8;
constexpr int GRADIENT_CLUSTER = 2;

// Gradients between the kernels.
struct StreamGradients {
  Buffer grad_y, x;                 // as products read them
  Buffer up, down;                  // transposed
  Buffer g, dh, grad_o, dz, norm, norm_bias;
};
struct WayGradients {
  Buffer proj, q_weight, kv_weight;  // transposed, gamma folded in
  Buffer grad_q, grad_kv, q_sums, kv_sums;
};

class Backward : Draft {
 public:
  explicit Backward(const BackwardCall& call);
  using Draft::scratch_bytes;

  void run();

 private:
  bool wants_x() const { return call_.grad_x[0] != 0 || call_.grad_x[1] != 0; }
  bool wants_parameters() const;
  // A stream as products over rows read it.
  Buffer compute_stream(Address address, int stream);
  // Into how many shares a position's members are cut.
  int splits(int way) const;
  // Pairs of tiles that a matrix [m, n] has, and all matrices.
  int pairs(int m, int n) const { return ceil_div(m, PAIR_ROWS) * ceil_div(n, p_.bottleneck); }
  int pairs_of_all() const;

  // ---- bcast_backward.cpp ----
  // Weights as the row kernels read them going back.
  void prepare_gradients();
  void lay_out();
  void exchange_backward();
  void attention_backward();
  void project_backward();

  // ---- bcast_parameter_gradients.cpp ----
  void position_sums();
  // A product over rows; returns where `finish` finds it.
  Parts add_job(const Buffer& left, const Buffer& right, int stream, RowFactor factor);
  // A layer's gradients from a product.
  WeightOut& add_out(Address weight, Address bias, const Parts& parts, int m, int n);
  void add_projection(int w, bool answers, NormOut& norm);
  void weight_gradient();
  void finish();

  const BackwardCall& call_;
  bool again_ = false;  // whether backward computes again what forward did not keep
  int clusters_ = 1, pairs_ = 0;
  StreamGradients stream_grads_[2];
  WayGradients way_grads_[2];
  Buffer parts_, sums_;
  Argument<WeightGradientArguments> gradient_;
  Argument<FinishArguments> finish_;
};

}  // namespace cast::cuda
