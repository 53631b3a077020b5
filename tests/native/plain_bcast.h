// B-CAST in plain loops over `T`, forward and backward.
#pragma once

#include <array>
#include <string>

#include "plain_math.h"

namespace cast::test {

enum class Window { absent = -1, time = 0, space = 1, space_time = 2 };

// Stream 0 is spatial (a CLS token before the patches of each frame), 1 temporal; direction a asks from stream a.
struct Sizes {
  i64 batch, frames, patches, dim, bottleneck, heads;
  Window window[2];

  bool present(int direction) const { return window[direction] != Window::absent; }
  i64 frame_tokens(int stream) const { return patches + 1 - stream; }
  i64 tokens(int stream) const { return frames * frame_tokens(stream); }  // of a clip
  i64 row(int stream, i64 t, i64 n) const { return t * frame_tokens(stream) + n + 1 - stream; }
  i64 window_length(int direction) const {
    const Window w = window[direction];
    return w == Window::time ? frames : w == Window::space ? patches : frames * patches;
  }
  // Which window a patch token belongs to, and its place in it.
  i64 group(int direction, i64 t, i64 n) const {
    const Window w = window[direction];
    return w == Window::time ? n : w == Window::space ? t : 0;
  }
  i64 place(int direction, i64 t, i64 n) const {
    const Window w = window[direction];
    return w == Window::time ? t : w == Window::space ? n : t * patches + n;
  }
};

// The 28 parameters in the order in which they travel: six of each stream, eight of each direction.
enum StreamField { kDownWeight, kDownBias, kNormWeight, kNormBias, kUpWeight, kUpBias };
enum DirectionField {
  kQueryPos,
  kAnswerPos,
  kQueryWeight,
  kQueryBias,
  kAnswerWeight,
  kAnswerBias,
  kProjWeight,
  kProjBias
};
constexpr int of(int stream, StreamField field) { return 6 * stream + field; }
constexpr int of(int direction, DirectionField field) { return 12 + 8 * direction + field; }

template <class T>
using Weights = std::array<Rows<T>, 28>;  // empty: absent

template <class T>
struct BcastGiven {
  Weights<T> weights;
  Rows<T> input[2], scale[2], grad_output[2];  // scale may be empty
  double eps;
};

template <class T>
struct BcastResults {
  Rows<T> output[2], grad_input[2];
  Weights<T> grads;
};

template <class T>
class PlainBcast {
 public:
  PlainBcast(const Sizes& sizes, const BcastGiven<T>& given) : s_(sizes), in_(given) {}

  BcastResults<T> run() {
    for (int i = 0; i < 28; ++i) out_.grads[i].assign(in_.weights[i].size(), T(0));
    for (int s = 0; s < 2; ++s) {
      out_.output[s] = in_.input[s];
      out_.grad_input[s].assign(in_.input[s].size(), T(0));
    }
    for (i64 clip = 0; clip < s_.batch; ++clip) run_clip(clip);
    return out_;
  }

 private:
  const Rows<T>& w(int which) const { return in_.weights[which]; }
  Rows<T>& dw(int which) { return out_.grads[which]; }

  Rows<T> clip_of(const Rows<T>& all, int stream, i64 clip) const {
    const i64 size = s_.tokens(stream) * s_.dim;
    return {all.begin() + clip * size, all.begin() + (clip + 1) * size};
  }

  void run_clip(i64 clip) {
    const i64 D = s_.dim, d = s_.bottleneck;
    Normed<T> normed[2];
    Rows<T> x[2], dnormed[2];
    for (int s = 0; s < 2; ++s) {
      x[s] = clip_of(in_.input[s], s, clip);
      const Rows<T> low = linear(x[s], w(of(s, kDownWeight)), w(of(s, kDownBias)), D, d);
      normed[s] = layer_norm(low, w(of(s, kNormWeight)), w(of(s, kNormBias)), d, in_.eps);
      dnormed[s].assign(normed[s].out.size(), T(0));
    }
    for (int a = 0; a < 2; ++a)
      if (s_.present(a)) exchange(clip, a, normed[a].out, normed[1 - a].out, dnormed[a], dnormed[1 - a]);
    for (int s = 0; s < 2; ++s) {
      const Rows<T> dlow = layer_norm_backward(dnormed[s], normed[s], w(of(s, kNormWeight)), d, dw(of(s, kNormWeight)),
                                               dw(of(s, kNormBias)));
      const Rows<T> dx =
          linear_backward(dlow, x[s], w(of(s, kDownWeight)), D, d, dw(of(s, kDownWeight)), dw(of(s, kDownBias)));
      const i64 first = clip * s_.tokens(s) * D;
      for (i64 i = 0; i < i64(dx.size()); ++i)
        out_.grad_input[s][first + i] = dx[i] + (s_.present(s) ? in_.grad_output[s][first + i] : T(0));
    }
  }

  // A stream's patch rows plus the position table, in the order of the tokens t * N + n.
  Rows<T> placed(const Rows<T>& normed, int stream, int direction, const Rows<T>& table) const {
    const i64 d = s_.bottleneck;
    Rows<T> rows(s_.frames * s_.patches * d);
    for (i64 t = 0; t < s_.frames; ++t)
      for (i64 n = 0; n < s_.patches; ++n)
        for (i64 c = 0; c < d; ++c) {
          const T position = table.empty() ? T(0) : table[s_.place(direction, t, n) * d + c];
          rows[(t * s_.patches + n) * d + c] = normed[s_.row(stream, t, n) * d + c] + position;
        }
    return rows;
  }

  void placed_backward(const Rows<T>& drows, int stream, int direction, Rows<T>& dnormed, Rows<T>& dtable) const {
    const i64 d = s_.bottleneck;
    for (i64 t = 0; t < s_.frames; ++t)
      for (i64 n = 0; n < s_.patches; ++n)
        for (i64 c = 0; c < d; ++c) {
          const T g = drows[(t * s_.patches + n) * d + c];
          dnormed[s_.row(stream, t, n) * d + c] += g;
          if (!dtable.empty()) dtable[s_.place(direction, t, n) * d + c] += g;
        }
  }

  // f(head) for every head of every window.
  template <class F>
  void each_head(int direction, const F& f) const {
    const i64 d = s_.bottleneck, width = d / s_.heads;
    std::vector<std::vector<i64>> groups(std::size_t(s_.frames * s_.patches));
    for (i64 t = 0; t < s_.frames; ++t)  // places ascend with t and n in every window
      for (i64 n = 0; n < s_.patches; ++n) groups[s_.group(direction, t, n)].push_back(t * s_.patches + n);
    for (const std::vector<i64>& tokens : groups) {
      for (i64 h = 0; !tokens.empty() && h < s_.heads; ++h) {
        std::vector<i64> asking, answering;
        for (const i64 token : tokens) {
          asking.push_back(token * d + h * width);
          answering.push_back(token * 2 * d + h * width);
        }
        f(Head<T>{asking, answering, d, width});
      }
    }
  }

  T factor(i64 clip, int stream, i64 row) const {
    if (in_.scale[stream].empty()) return T(1);
    return in_.scale[stream][stream == 0 ? clip * (s_.patches + 1) + row % (s_.patches + 1) : clip];
  }

  // One direction forward and backward: stream a asks, the other answers.
  void exchange(i64 clip, int a, const Rows<T>& asking, const Rows<T>& answering, Rows<T>& dasking,
                Rows<T>& danswering) {
    const i64 D = s_.dim, d = s_.bottleneck;
    const Rows<T> x = placed(asking, a, a, w(of(a, kQueryPos)));
    const Rows<T> y = placed(answering, 1 - a, a, w(of(a, kAnswerPos)));
    const Rows<T> q = linear(x, w(of(a, kQueryWeight)), w(of(a, kQueryBias)), d, d);
    const Rows<T> kv = linear(y, w(of(a, kAnswerWeight)), w(of(a, kAnswerBias)), d, 2 * d);
    Rows<T> mixed(q.size());
    each_head(a, [&](const Head<T>& head) { attend(head, q, kv, mixed); });
    const Rows<T> asked = linear(mixed, w(of(a, kProjWeight)), w(of(a, kProjBias)), d, d);

    // CLS rows carry the normalised CLS, the others what they asked for; both go through GELU and up.
    Rows<T> before = asking;
    for_patches(a, [&](i64 row, i64 token, i64 c) { before[row * d + c] = asked[token * d + c]; });
    Rows<T> hidden(before.size());
    for (i64 i = 0; i < i64(before.size()); ++i) hidden[i] = before[i] * normal_cdf(before[i]);
    const Rows<T> branch = linear(hidden, w(of(a, kUpWeight)), w(of(a, kUpBias)), d, D);
    Rows<T> dbranch(branch.size());
    const i64 first = clip * s_.tokens(a) * D;
    for (i64 i = 0; i < i64(branch.size()); ++i) {
      const T scale = factor(clip, a, i / D);
      out_.output[a][first + i] += scale * branch[i];
      dbranch[i] = scale * in_.grad_output[a][first + i];
    }

    Rows<T> dbefore =
        linear_backward(dbranch, hidden, w(of(a, kUpWeight)), d, D, dw(of(a, kUpWeight)), dw(of(a, kUpBias)));
    for (i64 i = 0; i < i64(before.size()); ++i)
      dbefore[i] *= normal_cdf(before[i]) + before[i] * normal_density(before[i]);
    Rows<T> dasked(asked.size());
    Rows<T> dcls = dbefore;
    for_patches(a, [&](i64 row, i64 token, i64 c) {
      dasked[token * d + c] = dbefore[row * d + c];
      dcls[row * d + c] = 0;
    });
    for (i64 i = 0; i < i64(dcls.size()); ++i) dasking[i] += dcls[i];
    const Rows<T> dmixed =
        linear_backward(dasked, mixed, w(of(a, kProjWeight)), d, d, dw(of(a, kProjWeight)), dw(of(a, kProjBias)));
    Rows<T> dq(q.size(), T(0)), dkv(kv.size(), T(0));
    each_head(a, [&](const Head<T>& head) { attend_backward(head, q, kv, dmixed, dq, dkv); });
    const Rows<T> dx =
        linear_backward(dq, x, w(of(a, kQueryWeight)), d, d, dw(of(a, kQueryWeight)), dw(of(a, kQueryBias)));
    const Rows<T> dy =
        linear_backward(dkv, y, w(of(a, kAnswerWeight)), d, 2 * d, dw(of(a, kAnswerWeight)), dw(of(a, kAnswerBias)));
    placed_backward(dx, a, a, dasking, dw(of(a, kQueryPos)));
    placed_backward(dy, 1 - a, a, danswering, dw(of(a, kAnswerPos)));
  }

  // f(row of the stream, patch token, channel) for everything but CLS.
  template <class F>
  void for_patches(int stream, const F& f) const {
    for (i64 t = 0; t < s_.frames; ++t)
      for (i64 n = 0; n < s_.patches; ++n)
        for (i64 c = 0; c < s_.bottleneck; ++c) f(s_.row(stream, t, n), t * s_.patches + n, c);
  }

  const Sizes s_;
  const BcastGiven<T>& in_;
  BcastResults<T> out_;
};

}  // namespace cast::test
