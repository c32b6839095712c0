#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm {

/// XXH64 of some bytes: a change of any bit, and of the order of any, changes it (of two different
/// runs of bytes one in 2^64 has the same). Not for adversaries.
///
/// Cost: one read; 10 GB/s on one core of an AMD EPYC.
/// Source: the specification, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
std::uint64_t checksum(const std::byte* from, std::size_t bytes, std::uint64_t seed = 0);

}  // namespace pycomm
