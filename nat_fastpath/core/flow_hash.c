/* SPDX-License-Identifier: Apache-2.0 */
#include "flow_hash.h"

/* Sixteen lanes of 32 bits: the compiler makes four SSE, two AVX2 or one AVX-512 operation of each line. */
typedef uint32_t lanes __attribute__((vector_size(64), aligned(4)));

#define HASH_MANY(suffix, attribute)                                                                         \
    attribute static void hash_many_##suffix(const uint64_t *addrs, const uint32_t *ports,                   \
                                             const uint8_t *protocols, uint32_t *hashes, unsigned n)         \
    {                                                                                                        \
        for (unsigned i = 0; i < n; i += 16) {                                                               \
            lanes word[4], h;                                                                                \
            for (unsigned k = 0; k < 16; k++) {                                                              \
                word[0][k] = (uint32_t)addrs[i + k];                                                         \
                word[1][k] = (uint32_t)(addrs[i + k] >> 32);                                                 \
                word[2][k] = ports[i + k];                                                                   \
                word[3][k] = protocols[i + k];                                                               \
                h[k] = FNV_BASIS;                                                                            \
            }                                                                                                \
            for (unsigned w = 0; w < 3; w++) {                                                               \
                h = (h ^ (word[w] & 0xff)) * FNV_PRIME;                                                      \
                h = (h ^ (word[w] >> 8 & 0xff)) * FNV_PRIME;                                                 \
                h = (h ^ (word[w] >> 16 & 0xff)) * FNV_PRIME;                                                \
                h = (h ^ word[w] >> 24) * FNV_PRIME;                                                         \
            }                                                                                                \
            h = (h ^ word[3]) * FNV_PRIME;                                                                   \
            h ^= h >> 16;                                                                                    \
            h *= 0x85ebca6bu;                                                                                \
            h ^= h >> 13;                                                                                    \
            h *= 0xc2b2ae35u;                                                                                \
            h ^= h >> 16;                                                                                    \
            *(lanes *)(hashes + i) = h;                                                                      \
        }                                                                                                    \
    }

HASH_MANY(baseline, )
#if defined(__x86_64__)
HASH_MANY(avx2, __attribute__((target("avx2"))))
HASH_MANY(avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

flow_hash_many_fn flow_hash_choose(const char **name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        *name = "avx512";
        return hash_many_avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
        *name = "avx2";
        return hash_many_avx2;
    }
#endif
    *name = "baseline";
    return hash_many_baseline;
}
