// Tests of csrc/core against independent definitions. Prints each failure; exits with their number
// (tests/cpp/test_core.py builds and runs it).

#include "csrc/objectives/core.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "csrc/common/logarithm.h"
#include "csrc/stamp_triggers/core.h"
#include "csrc/trigger_update/core.h"

namespace {

int failures = 0;

#define EXPECT(condition)                                                         \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::printf("%s:%d: expected %s\n", "core_test.cpp", __LINE__, #condition); \
      ++failures;                                                                 \
    }                                                                             \
  } while (false)

using namespace pydetox;

// Worst relative error of s and 1 - s, in units of epsilon, against long double.
template <class T>
double worst_sigmoid_error(double limit) {
  long double worst = 0;
  for (double w = -limit; w <= limit; w += limit / 50021) {
    const T logit = static_cast<T>(w);
    const auto s = sigmoid_of_twice(logit);
    const long double value = 1 / (1 + std::exp(-2.0L * logit));
    const long double complement = 1 / (1 + std::exp(2.0L * logit));
    worst = std::fmax(worst, std::fabs(s.value / value - 1));
    worst = std::fmax(worst, std::fabs(s.complement / complement - 1));
  }
  return static_cast<double>(worst / std::numeric_limits<T>::epsilon());
}

void sigmoid_is_accurate_in_both_tails() {
  EXPECT(worst_sigmoid_error<float>(43.0) < 0.7);
  EXPECT(worst_sigmoid_error<double>(353.0) < 0.7);
  EXPECT(worst_sigmoid_error<float>(3.0) < 0.7);
  EXPECT(worst_sigmoid_error<double>(3.0) < 0.7);
}

void sigmoid_agrees_with_its_definition() {
  for (double w : {-3.0, -0.25, 0.0, 0.5, 2.0}) {
    EXPECT(std::fabs(sigmoid_of_twice(w).value - (std::tanh(w) / 2 + 0.5)) < 1e-15);
  }
}

void sigmoid_keeps_nan_and_bounds_infinity() {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT(std::isnan(sigmoid_of_twice(std::nanf("")).value));
  EXPECT(std::isnan(sigmoid_of_twice(std::nan("")).complement));
  EXPECT(sigmoid_of_twice(inf).value == 1);
  EXPECT(sigmoid_of_twice(inf).complement < 1e-37f);
  EXPECT(sigmoid_of_twice(-inf).value < 1e-37f);
  EXPECT(sigmoid_of_twice(-inf).complement == 1);
}

void bfloat16_keeps_every_value_it_can_hold() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const BFloat16 value{static_cast<uint16_t>(bits)};
    const float number = to_float(value);
    if (std::isnan(number)) {
      EXPECT(std::isnan(to_float(to_bfloat16(number))));
    } else {
      EXPECT(to_bfloat16(number).bits == bits);
    }
  }
}

void bfloat16_rounds_to_nearest_even() {
  // 1 + i/128 are neighbours; halves go to the even mantissa, everything else to the nearer one.
  for (int i = 0; i < 128; ++i) {
    const float low = 1 + i / 128.0f, high = 1 + (i + 1) / 128.0f,
                middle = 1 + (2 * i + 1) / 256.0f;
    EXPECT(to_float(to_bfloat16(middle)) == (i % 2 == 0 ? low : high));
    EXPECT(to_float(to_bfloat16(std::nextafter(middle, 0.0f))) == low);
    EXPECT(to_float(to_bfloat16(std::nextafter(middle, 9.0f))) == high);
  }
  EXPECT(std::isinf(to_float(to_bfloat16(std::numeric_limits<float>::max()))));
}

void a_byte_is_a_255th() {
  for (int i = 0; i < 256; ++i) {
    EXPECT(load_pixel<float>(static_cast<uint8_t>(i)) == static_cast<float>(i) / 255.0f);
    EXPECT(load_pixel<double>(static_cast<uint8_t>(i)) == i / 255.0);
  }
}

// Output order against cutting the image with four loops.
void patch_rows_are_in_convolution_order() {
  for (const int64_t patch : {0, 1, 2, 3, 6}) {
    const StampShape shape{2, 3, 2, 12, 6, patch};
    const int64_t side_y = patch == 0 ? shape.height : patch;
    const int64_t side_x = patch == 0 ? shape.width : patch;
    std::vector<int> seen(shape.pixels(), 0);
    int64_t next = shape.output_offset(1, 2, 0, 0, 0), group = 0;
    for (int64_t top = 0; top < shape.height; top += side_y) {
      for (int64_t left = 0; left < shape.width; left += side_x, ++group) {
        for (int64_t c = 0; c < shape.channels; ++c) {
          for (int64_t y = 0; y < side_y; ++y) {
            for (int64_t x = 0; x < side_x; ++x, ++next) {
              const int64_t inner = y * side_x + x;
              EXPECT(shape.output_offset(1, 2, group, c, inner) == next);
              EXPECT(shape.plane_offset(group, inner) == (top + y) * shape.width + left + x);
              EXPECT(shape.pixel_offset(top + y, left + x) ==
                     shape.output_offset(0, 0, group, 0, inner));
              ++seen[shape.plane_offset(group, inner)];
            }
          }
        }
      }
    }
    EXPECT(group == shape.groups());
    for (int count : seen) EXPECT(count == shape.channels);
  }
}

void clip_passes_gradients_on_the_closed_interval() {
  EXPECT(passed_gradient(0.0f, 3.0f) == 3);
  EXPECT(passed_gradient(1.0f, 3.0f) == 3);
  EXPECT(passed_gradient(std::nextafter(1.0f, 2.0f), 3.0f) == 0);
  EXPECT(passed_gradient(-1e-30f, 3.0f) == 0);
  EXPECT(passed_gradient(std::nanf(""), 3.0f) == 0);
  EXPECT(clip_and_normalize(2.0, 0.25, 4.0) == 3);
  EXPECT(clip_and_normalize(-2.0, 0.25, 4.0) == -1);
  EXPECT(std::isnan(clip_and_normalize(std::nan(""), 0.25, 4.0)));
}

// The closed forms against central differences of y = (v - mean) / std, v = (1 - m) x + m p, clip
// off.
void boxes_stay_inside_of_the_image() {
  const StampShape shape{1, 1, 1, 12, 6, 0};
  const StampCrop crop{5, 6, nullptr};
  constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const int64_t given[][2] = {{0, 0}, {7, 0}, {8, 1}, {-1, -1}, {kLeast, kMost}, {kMost, kLeast}};
  const int64_t expected[] = {0, 7, 7, 0, 0, 7};
  for (int i = 0; i < 6; ++i) {
    const Corner corner = crop.inside(shape, given[i]);
    EXPECT(corner.top == expected[i] && corner.left == 0);
  }
}

void gradients_are_the_derivatives_of_stamping() {
  const double x = 0.3, mean = 0.4, inverse_std = 4, step = 1e-6;
  const auto y = [&](double mask_logit, double pattern_logit) {
    const auto blend = make_blend(sigmoid_of_twice(mask_logit), sigmoid_of_twice(pattern_logit));
    return clip_and_normalize(blend(x), mean, inverse_std);
  };
  for (double mask_logit : {-1.5, 0.0, 0.7}) {
    for (double pattern_logit : {-2.0, 0.1, 1.0}) {
      const auto m = sigmoid_of_twice(mask_logit), p = sigmoid_of_twice(pattern_logit);
      const double g = passed_gradient(make_blend(m, p)(x), 1.0);
      const double by_mask = mask_logit_gradient(mask_term(g, inverse_std, p.value, x), m);
      const double by_pattern = pattern_logit_gradient(g, inverse_std, m, p);
      const double up = y(mask_logit + step, pattern_logit),
                   down = y(mask_logit - step, pattern_logit);
      const double left = y(mask_logit, pattern_logit - step),
                   right = y(mask_logit, pattern_logit + step);
      EXPECT(std::fabs(by_mask - (up - down) / (2 * step)) < 1e-8);
      EXPECT(std::fabs(by_pattern - (right - left) / (2 * step)) < 1e-8);
    }
  }
}

void chunks_cover_the_batch() {
  EXPECT(batch_chunks(0) == 0);
  EXPECT(batch_chunks(1) == 1);
  EXPECT(batch_chunks(kBatchChunk) == 1);
  EXPECT(batch_chunks(kBatchChunk + 1) == 2);
}

void logarithm_is_accurate() {
  long double worst = 0;
  for (double step = 1.0000731, x = step; x < 1e9; x *= step) {
    for (const double value : {x, 1 / x}) {
      worst = std::fmax(worst, std::fabs(natural_log(value) / std::log(1.0L * value) - 1));
    }
  }
  EXPECT(worst < 2.0 * std::numeric_limits<double>::epsilon());
  EXPECT(natural_log(1.0) == 0);
  EXPECT(natural_log(1 + 0x1p-52) == 0x1p-52);
  EXPECT(std::isnan(natural_log(not_a_number())));
  EXPECT(std::isinf(natural_log(std::numeric_limits<double>::infinity())));
}

void powers_are_products() {
  EXPECT(power(0.9, 0) == 1);
  EXPECT(power(0.9, 1) == 0.9);
  EXPECT(power(2.0, 30) == 1 << 30);
  EXPECT(std::fabs(power(0.999, 12345) / std::pow(0.999L, 12345) - 1) < 1e-12);
  EXPECT(power(0.5, int64_t{1} << 40) == 0);
}

void signs_of_differences() {
  EXPECT(sign_of_difference(1.0, 0.5) == 1);
  EXPECT(sign_of_difference(0.5, 1.0) == -1);
  EXPECT(sign_of_difference(0.5, 0.5) == 0);
  EXPECT(sign_of_difference(std::nan(""), 0.5) == 0);
}

void rows_of_zeros_have_no_direction_and_infinite_ones_none_that_counts() {
  EXPECT(inverse_norm(0) == 0);
  EXPECT(inverse_norm(4) == 0.5);
  EXPECT(std::isnan(inverse_norm(std::numeric_limits<double>::infinity())));
  EXPECT(std::isnan(inverse_norm(not_a_number())));
}

}  // namespace

int main() {
  sigmoid_is_accurate_in_both_tails();
  sigmoid_agrees_with_its_definition();
  sigmoid_keeps_nan_and_bounds_infinity();
  bfloat16_keeps_every_value_it_can_hold();
  bfloat16_rounds_to_nearest_even();
  a_byte_is_a_255th();
  patch_rows_are_in_convolution_order();
  clip_passes_gradients_on_the_closed_interval();
  boxes_stay_inside_of_the_image();
  gradients_are_the_derivatives_of_stamping();
  chunks_cover_the_batch();
  logarithm_is_accurate();
  powers_are_products();
  signs_of_differences();
  rows_of_zeros_have_no_direction_and_infinite_ones_none_that_counts();
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
