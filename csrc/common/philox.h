#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace pydetox {

struct Random128 {
  uint32_t word[4];
};

// Philox4x32-10: 128 random bits of a 64-bit key and a 128-bit counter. Source: Salmon, Moraes,
// Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
PYDETOX_HD Random128 philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t a = static_cast<uint32_t>(counter_low), b = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c = static_cast<uint32_t>(counter_high), d = static_cast<uint32_t>(counter_high >> 32);
  uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  PYDETOX_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * a;
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * c;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key_low;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ key_high;
    d = static_cast<uint32_t>(first);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

}  // namespace pydetox
