// The table of handlers: a handler's code is its place here.
#pragma once

#include "copies.h"
#include "integer.h"
#include "warp.h"
#include "wgmma.h"

namespace ptx::PTX_LEVEL {
namespace {

#define INTEGERS(name, function) \
  {name ".u16", function<u16>}, {name ".u32", function<u32>}, { name ".u64", function<u64> }
#define SIGNED(name, function) \
  {name ".s16", function<i16>}, {name ".s32", function<i32>}, { name ".s64", function<i64> }
#define COMPARISON(name, F) \
  {"setp." name ".u16", compare<u16, F>}, {"setp." name ".u32", compare<u32, F>}, \
      {"setp." name ".u64", compare<u64, F>}, {"setp." name ".s16", compare<i16, F>}, \
      {"setp." name ".s32", compare<i32, F>}, {"setp." name ".s64", compare<i64, F>}, \
      {"setp." name ".f32", compare<float, F>}, {"setp." name ".bf16", compare<Bf16, F>}, \
      {"setp." name ".f16", compare<F16, F>}, { \
    "setp." name ".f64", compare<double, F> \
  }
#define FLOATING_COMPARISON(name, F) \
  {"setp." name ".f32", compare<float, F>}, {"setp." name ".bf16", compare<Bf16, F>}, { \
    "setp." name ".f16", compare<F16, F> \
  }
#define EXTENSIONS(name, T, W) \
  {"extend." name ".8", extend<T, W, u64>}, {"extend." name ".4", extend<T, W, u32>}, { \
    "extend." name ".2", extend<T, W, u16> \
  }
#define HALVES(kind, H) \
  {"add." kind, half_two<H, AddOnce>}, {"sub." kind, half_two<H, SubOnce>}, {"mul." kind, half_two<H, Mul>}, \
      {"fma." kind, half_three<H, FmaOnce>}, {"add." kind "x2", pair_two<H, AddOnce>}, \
      {"sub." kind "x2", pair_two<H, SubOnce>}, {"mul." kind "x2", pair_two<H, Mul>}, \
      {"fma." kind "x2", pair_three<H, FmaOnce>}, {"cvt." kind ".f32", narrow<H, false>}, \
      {"cvt.rz." kind ".f32", narrow<H, true>}, {"cvt." kind "x2.f32", narrow_pair<H, false>}, \
      {"cvt.rz." kind "x2.f32", narrow_pair<H, true>}, { \
    "cvt.f32." kind, widen<H> \
  }
#define ROUNDINGS(name, F) \
  {"cvt." name ".s32.f32", to_integer<i32, F>}, {"cvt." name ".u32.f32", to_integer<u32, F>}, \
      {"cvt." name ".s64.f32", to_integer<i64, F>}, {"cvt." name ".u64.f32", to_integer<u64, F>}, { \
    "cvt." name ".f32.f32", to_whole<F> \
  }
#define LOADS(space, function) \
  {"ld." space ".u8.2", function<u8, u16>}, {"ld." space ".u8.4", function<u8, u32>}, \
      {"ld." space ".u8.8", function<u8, u64>}, {"ld." space ".s8.2", function<i8, u16>}, \
      {"ld." space ".s8.4", function<i8, u32>}, {"ld." space ".u16.2", function<u16, u16>}, \
      {"ld." space ".u16.4", function<u16, u32>}, {"ld." space ".u16.8", function<u16, u64>}, \
      {"ld." space ".s16.4", function<i16, u32>}, {"ld." space ".u32.4", function<u32, u32>}, \
      {"ld." space ".u32.8", function<u32, u64>}, {"ld." space ".s32.8", function<i32, u64>}, \
      {"ld." space ".u64.8", function<u64, u64>}, { \
    "ld." space ".u8.1", function<u8, u8> \
  }
#define STORES(space, function) \
  {"st." space ".u8.1", function<u8, u8>}, {"st." space ".u8.2", function<u8, u16>}, \
      {"st." space ".u8.4", function<u8, u32>}, {"st." space ".u16.2", function<u16, u16>}, \
      {"st." space ".u16.4", function<u16, u32>}, {"st." space ".u32.4", function<u32, u32>}, \
      {"st." space ".u32.8", function<u32, u64>}, { \
    "st." space ".u64.8", function<u64, u64> \
  }

const Entry kTable[] = {
    INTEGERS("add", add),
    INTEGERS("sub", sub),
    {"mul.lo.u16", mul<u16>},
    {"mul.lo.u32", mul32},
    {"mul.lo.u64", mul<u64>},
    {"mad.lo.u16", mad<u16>},
    {"mad.lo.u32", mad32},
    {"mad.lo.u64", mad<u64>},
    {"mul.hi.u16", mul_high<u16>},
    {"mul.hi.s16", mul_high<i16>},
    {"mul.hi.u32", mul_high<u32>},
    {"mul.hi.s32", mul_high<i32>},
#if defined(__SIZEOF_INT128__)
    {"mul.hi.u64", mul_high<u64>},
    {"mul.hi.s64", mul_high<i64>},
#endif
    {"mul.wide.u16", mul_wide<u16>},
    {"mul.wide.s16", mul_wide<i16>},
    {"mul.wide.u32", mul_wide<u32>},
    {"mul.wide.s32", mul_wide<i32>},
    {"mad.wide.u16", mad_wide<u16>},
    {"mad.wide.s16", mad_wide<i16>},
    {"mad.wide.u32", mad_wide<u32>},
    {"mad.wide.s32", mad_wide<i32>},
    INTEGERS("div", divide),
    SIGNED("div", divide),
    INTEGERS("rem", remain),
    SIGNED("rem", remain),
    INTEGERS("min", least),
    SIGNED("min", least),
    INTEGERS("max", most),
    SIGNED("max", most),
    SIGNED("neg", negate),
    SIGNED("abs", absolute),
    INTEGERS("and", bit_and),
    INTEGERS("or", bit_or),
    INTEGERS("xor", bit_xor),
    INTEGERS("not", bit_not),
    {"and.pred", and_pred},
    {"or.pred", or_pred},
    {"xor.pred", xor_pred},
    {"not.pred", not_pred},
    {"lop3", lop3},
    INTEGERS("shl", shift_left),
    INTEGERS("shr", shift_right),
    SIGNED("shr", shift_right),
    {"shf.l.wrap", funnel<true, true>},
    {"shf.r.wrap", funnel<false, true>},
    {"shf.l.clamp", funnel<true, false>},
    {"shf.r.clamp", funnel<false, false>},
    {"bfe.u32", extract_u32},
    {"bfe.s32", extract_s32},
    {"bfi.b32", insert_b32},
    {"popc.b32", count_ones},
    {"clz.b32", count_zeros},
    {"prmt", permute},
    {"mov.1", move<u8>},
    {"mov.2", move<u16>},
    {"mov.4", move<u32>},
    {"mov.8", move<u64>},
    {"selp.2", select<u16>},
    {"selp.4", select<u32>},
    {"selp.8", select<u64>},
    {"pack.2.4", pack_two<u16, u32>},
    {"pack.4.8", pack_two<u32, u64>},
    {"pack.2.8", pack_four},
    {"unpack.4.2", unpack<u32, u16>},
    {"unpack.8.4", unpack<u64, u32>},
    {"unpack.8.2", unpack<u64, u16>},
    EXTENSIONS("u8.2", u8, u16),
    EXTENSIONS("u8.4", u8, u32),
    EXTENSIONS("u8.8", u8, u64),
    EXTENSIONS("s8.2", i8, u16),
    EXTENSIONS("s8.4", i8, u32),
    EXTENSIONS("s8.8", i8, u64),
    EXTENSIONS("u16.2", u16, u16),
    EXTENSIONS("u16.4", u16, u32),
    EXTENSIONS("u16.8", u16, u64),
    EXTENSIONS("s16.2", i16, u16),
    EXTENSIONS("s16.4", i16, u32),
    EXTENSIONS("s16.8", i16, u64),
    EXTENSIONS("u32.4", u32, u32),
    EXTENSIONS("u32.8", u32, u64),
    EXTENSIONS("s32.4", i32, u32),
    EXTENSIONS("s32.8", i32, u64),
    EXTENSIONS("u64.8", u64, u64),

    {"add.f32", f32_two<Add>},
    {"sub.f32", f32_two<Sub>},
    {"mul.f32", f32_two<Mul>},
    {"div.f32", f32_two<Div>},
    {"fma.f32", f32_three<Fma>},
    {"sqrt.f32", f32_one<Sqrt>},
    {"rsqrt.f32", f32_one<Rsqrt>},
    {"rcp.f32", f32_one<Rcp>},
    {"ex2.f32", f32_one<Exp2>},
    {"min.f32", f32_two<Extreme<false, false>>},
    {"max.f32", f32_two<Extreme<true, false>>},
    {"min.NaN.f32", f32_two<Extreme<false, true>>},
    {"max.NaN.f32", f32_two<Extreme<true, true>>},
    {"min3.f32", f32_three<Extreme<false, false>>},
    {"max3.f32", f32_three<Extreme<true, false>>},
    {"min3.NaN.f32", f32_three<Extreme<false, true>>},
    {"max3.NaN.f32", f32_three<Extreme<true, true>>},
    {"flip.4", flip_bits<u32>},
    {"flip.2", flip_bits<u16>},
    {"keep.4", keep_bits<u32>},
    {"keep.2", keep_bits<u16>},
    HALVES("bf16", Bf16),
    HALVES("f16", F16),
    {"cvt.rna.tf32.f32", to_tf32},
    ROUNDINGS("rni", Near),
    ROUNDINGS("rzi", Zero),
    ROUNDINGS("rmi", Down),
    ROUNDINGS("rpi", Up),
    {"cvt.f32.s16", to_float<i16>},
    {"cvt.f32.u16", to_float<u16>},
    {"cvt.f32.s32", to_float<i32>},
    {"cvt.f32.u32", to_float<u32>},
    {"cvt.f32.s64", to_float<i64>},
    {"cvt.f32.u64", to_float<u64>},
    COMPARISON("eq", Eq),
    COMPARISON("ne", Ne),
    COMPARISON("lt", Lt),
    COMPARISON("le", Le),
    COMPARISON("gt", Gt),
    COMPARISON("ge", Ge),
    FLOATING_COMPARISON("equ", OrNan<Eq>),
    FLOATING_COMPARISON("neu", OrNan<Ne>),
    FLOATING_COMPARISON("ltu", OrNan<Lt>),
    FLOATING_COMPARISON("leu", OrNan<Le>),
    FLOATING_COMPARISON("gtu", OrNan<Gt>),
    FLOATING_COMPARISON("geu", OrNan<Ge>),
    FLOATING_COMPARISON("num", Num),
    FLOATING_COMPARISON("nan", Nan),

    LOADS("global", load_global),
    LOADS("shared", load_shared),
    LOADS("bank", load_bank),
    STORES("global", store_global),
    STORES("shared", store_shared),
    {"cp.async", copy_issue},
    {"cp.async.commit_group", copy_commit},
    {"cp.async.wait", copy_wait},
    {"ldmatrix", load_matrix},
    {"stmatrix", store_matrix},
    {"mma.bf16.4.2", multiply<MmaBf16, 4, 2>},
    {"mma.bf16.2.1", multiply<MmaBf16, 2, 1>},
    {"mma.f16.4.2", multiply<MmaF16, 4, 2>},
    {"mma.f16.2.1", multiply<MmaF16, 2, 1>},
    {"mma.tf32.4.2", multiply<MmaTf32, 4, 2>},
    {"mma.tf32.2.1", multiply<MmaTf32, 2, 1>},
    {"wgmma.fence", product_fence},
    {"wgmma.commit", product_commit},
    {"wgmma.wait", product_wait},
    {"wgmma.product", product},
    {"wgmma.touch", touch},
    {"wgmma.rename", rename},
    {"wgmma.uses", uses},
    {"fence.proxy.async", proxy_fence},
    {"nothing", nothing},
    {"shfl", shuffle},
    {"vote", vote},
    {"activemask", active_mask},
    {"elect", elect},
};

}  // namespace
}  // namespace ptx::PTX_LEVEL
