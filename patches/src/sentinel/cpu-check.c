// What this CPU can do, and what the system lets programs use of it.

#include "sentinel.h"

#include <stdint.h>
#include <string.h>

extern const char llama_cpp_built_for[];

const char * llama_cpp_sentinel_built_for(void) {
    return llama_cpp_built_for;
}

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER)
#    include <immintrin.h>
#    include <intrin.h>
#else
#    include <cpuid.h>
#endif

enum { EAX, EBX, ECX, EDX };

// XCR0: registers that the system saves when it switches between programs
#define NONE 0x0u
#define YMM  0x6u
#if defined(__APPLE__)
#    define ZMM YMM // macOS adds the rest at a program's first use
#else
#    define ZMM 0xe6u
#endif
#define EGPR 0x80000u

#define EXTENDED 0x80000001u

static const struct {
    const char * name;
    uint32_t     leaf;
    uint32_t     subleaf;
    int          reg;
    int          bit;
    uint32_t     xcr0;
} features[] = {
    { "sse3",             0x1,      0, ECX,  0, NONE },
    { "pclmulqdq",        0x1,      0, ECX,  1, NONE },
    { "ssse3",            0x1,      0, ECX,  9, NONE },
    { "fma",              0x1,      0, ECX, 12, YMM  },
    { "sse4_1",           0x1,      0, ECX, 19, NONE },
    { "sse4_2",           0x1,      0, ECX, 20, NONE },
    { "movbe",            0x1,      0, ECX, 22, NONE },
    { "popcnt",           0x1,      0, ECX, 23, NONE },
    { "aes",              0x1,      0, ECX, 25, NONE },
    { "avx",              0x1,      0, ECX, 28, YMM  },
    { "f16c",             0x1,      0, ECX, 29, YMM  },
    { "bmi1",             0x7,      0, EBX,  3, NONE },
    { "avx2",             0x7,      0, EBX,  5, YMM  },
    { "bmi2",             0x7,      0, EBX,  8, NONE },
    { "avx512f",          0x7,      0, EBX, 16, ZMM  },
    { "avx512dq",         0x7,      0, EBX, 17, ZMM  },
    { "avx512ifma",       0x7,      0, EBX, 21, ZMM  },
    { "avx512er",         0x7,      0, EBX, 27, ZMM  },
    { "avx512cd",         0x7,      0, EBX, 28, ZMM  },
    { "avx512bw",         0x7,      0, EBX, 30, ZMM  },
    { "avx512vl",         0x7,      0, EBX, 31, ZMM  },
    { "avx512vbmi",       0x7,      0, ECX,  1, ZMM  },
    { "avx512_vbmi2",     0x7,      0, ECX,  6, ZMM  },
    { "gfni",             0x7,      0, ECX,  8, NONE },
    { "vaes",             0x7,      0, ECX,  9, YMM  },
    { "vpclmulqdq",       0x7,      0, ECX, 10, YMM  },
    { "avx512_vnni",      0x7,      0, ECX, 11, ZMM  },
    { "avx512_bitalg",    0x7,      0, ECX, 12, ZMM  },
    { "avx512_vpopcntdq", 0x7,      0, ECX, 14, ZMM  },
    { "avx512_fp16",      0x7,      0, EDX, 23, ZMM  },
    { "avx_vnni",         0x7,      1, EAX,  4, YMM  },
    { "avx512_bf16",      0x7,      1, EAX,  5, ZMM  },
    { "avx_ifma",         0x7,      1, EAX, 23, YMM  },
    { "avx_vnni_int8",    0x7,      1, EDX,  4, YMM  },
    { "avx_ne_convert",   0x7,      1, EDX,  5, YMM  },
    { "avx_vnni_int16",   0x7,      1, EDX, 10, YMM  },
    { "apx_f",            0x7,      1, EDX, 21, EGPR },
    { "lzcnt",            EXTENDED, 0, ECX,  5, NONE },
    { "sse4a",            EXTENDED, 0, ECX,  6, NONE },
    { "xop",              EXTENDED, 0, ECX, 11, YMM  },
    { "fma4",             EXTENDED, 0, ECX, 16, YMM  },
    { "tbm",              EXTENDED, 0, ECX, 21, NONE },
};

static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t regs[4]) {
#if defined(_MSC_VER)
    __cpuidex((int *) regs, (int) leaf, (int) subleaf);
#else
    __cpuid_count(leaf, subleaf, regs[EAX], regs[EBX], regs[ECX], regs[EDX]);
#endif
}

static uint32_t xcr0(void) {
    uint32_t regs[4];
    cpuid(1, 0, regs);
    if (!(regs[ECX] & (1u << 27))) { // OSXSAVE
        return 0;
    }
#if defined(_MSC_VER)
    return (uint32_t) _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0)); // xgetbv
    return low;
#endif
}

static int has(uint32_t leaf, uint32_t subleaf, int reg, int bit) {
    uint32_t regs[4];
    cpuid(leaf & 0x80000000u, 0, regs);
    if (regs[EAX] < leaf) {
        return 0;
    }
    if (subleaf > 0) {
        cpuid(leaf, 0, regs);
        if (regs[EAX] < subleaf) {
            return 0;
        }
    }
    cpuid(leaf, subleaf, regs);
    return (regs[reg] >> bit) & 1;
}

int llama_cpp_sentinel_cpu_has(const char * name) {
    for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
        if (strcmp(features[i].name, name) == 0) {
            const uint32_t saved = features[i].xcr0;
            return has(features[i].leaf, features[i].subleaf, features[i].reg, features[i].bit) &&
                   (saved == NONE || (xcr0() & saved) == saved);
        }
    }
    return -1;
}

#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))

#if defined(__linux__)
#    include <stdio.h>
#    include <sys/auxv.h>
#    include <sys/utsname.h>
#    ifndef AT_HWCAP2
#        define AT_HWCAP2 26
#    endif
#else
#    include <sys/sysctl.h>
#endif

static const struct {
    const char * name;
    int          word; // AT_HWCAP, AT_HWCAP2 of Linux
    int          bit;
    const char * sysctl; // of macOS
} features[] = {
    { "atomics",  1,  8, "hw.optional.arm.FEAT_LSE"     },
    { "fphp",     1,  9, "hw.optional.arm.FEAT_FP16"    },
    { "asimdhp",  1, 10, "hw.optional.arm.FEAT_FP16"    },
    { "asimdrdm", 1, 12, "hw.optional.arm.FEAT_RDM"     },
    { "jscvt",    1, 13, "hw.optional.arm.FEAT_JSCVT"   },
    { "fcma",     1, 14, "hw.optional.arm.FEAT_FCMA"    },
    { "lrcpc",    1, 15, "hw.optional.arm.FEAT_LRCPC"   },
    { "asimddp",  1, 20, "hw.optional.arm.FEAT_DotProd" },
    { "sve",      1, 22, "hw.optional.arm.FEAT_SVE"     },
    { "asimdfhm", 1, 23, "hw.optional.arm.FEAT_FHM"     },
    { "sve2",     2,  1, "hw.optional.arm.FEAT_SVE2"    },
    { "frint",    2,  8, "hw.optional.arm.FEAT_FRINTTS" },
    { "i8mm",     2, 13, "hw.optional.arm.FEAT_I8MM"    },
    { "bf16",     2, 14, "hw.optional.arm.FEAT_BF16"    },
    { "sme",      2, 23, "hw.optional.arm.FEAT_SME"     },
    { "mops",     2, 43, "hw.optional.arm.FEAT_MOPS"    },
};

#if defined(__linux__)
// i8mm and bf16 are there since Linux 5.6, whatever the CPU can do
static int kernel_names_all(void) {
    struct utsname system;
    int            major = 0, minor = 0;
    if (uname(&system) != 0 || sscanf(system.release, "%d.%d", &major, &minor) != 2) {
        return 0;
    }
    return major > 5 || (major == 5 && minor >= 6);
}
#endif

int llama_cpp_sentinel_cpu_has(const char * name) {
    for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
        if (strcmp(features[i].name, name) == 0) {
#if defined(__linux__)
            const uint64_t word = getauxval(features[i].word == 1 ? AT_HWCAP : AT_HWCAP2);
            return (word >> features[i].bit) & 1 ? 1 : kernel_names_all() ? 0 : -1;
#else
            int    value = 0;
            size_t size  = sizeof(value);
            if (sysctlbyname(features[i].sysctl, &value, &size, NULL, 0) != 0) {
                return -1; // an older macOS does not know the name
            }
            return value != 0;
#endif
        }
    }
    return -1;
}

#else

int llama_cpp_sentinel_cpu_has(const char * name) {
    (void) name;
    return -1;
}

#endif
