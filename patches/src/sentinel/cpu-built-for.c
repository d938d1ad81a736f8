// Compiled with the options of what computes (ggml-cpu), and so without code: none of it may run before the check.

#include "sentinel.h"

// What compilers emit by themselves, and what ggml's kernels are written for. AMX is left out, since ggml asks for it
// when it runs, and so is what intrinsics alone make and ggml does not call (rdrand, clwb, sha, ...). The best known come
// first: a message names the first few.
const char llama_cpp_built_for[] = ""
#if defined(__x86_64__) || defined(_M_X64)
#    if defined(__AVX__)
    " avx"
#    endif
#    if defined(__AVX2__)
    " avx2"
#    endif
#    if defined(__FMA__)
    " fma"
#    endif
#    if defined(__F16C__)
    " f16c"
#    endif
#    if defined(__BMI2__)
    " bmi2"
#    endif
#    if defined(__AVX512F__)
    " avx512f"
#    endif
#    if defined(__AVX512BW__)
    " avx512bw"
#    endif
#    if defined(__AVX512DQ__)
    " avx512dq"
#    endif
#    if defined(__AVX512VL__)
    " avx512vl"
#    endif
#    if defined(__AVX512CD__)
    " avx512cd"
#    endif
#    if defined(__AVX512VNNI__)
    " avx512_vnni"
#    endif
#    if defined(__AVX512VBMI__)
    " avx512vbmi"
#    endif
#    if defined(__AVX512BF16__)
    " avx512_bf16"
#    endif
#    if defined(__AVX512FP16__)
    " avx512_fp16"
#    endif
#    if defined(__AVXVNNI__)
    " avx_vnni"
#    endif
#    if defined(__SSE3__)
    " sse3"
#    endif
#    if defined(__SSSE3__)
    " ssse3"
#    endif
#    if defined(__SSE4_1__)
    " sse4_1"
#    endif
#    if defined(__SSE4_2__)
    " sse4_2"
#    endif
#    if defined(__SSE4A__)
    " sse4a"
#    endif
#    if defined(__POPCNT__)
    " popcnt"
#    endif
#    if defined(__LZCNT__)
    " lzcnt"
#    endif
#    if defined(__MOVBE__)
    " movbe"
#    endif
#    if defined(__BMI__)
    " bmi1"
#    endif
#    if defined(__TBM__)
    " tbm"
#    endif
#    if defined(__AES__)
    " aes"
#    endif
#    if defined(__PCLMUL__)
    " pclmulqdq"
#    endif
#    if defined(__GFNI__)
    " gfni"
#    endif
#    if defined(__FMA4__)
    " fma4"
#    endif
#    if defined(__XOP__)
    " xop"
#    endif
#    if defined(__VAES__)
    " vaes"
#    endif
#    if defined(__VPCLMULQDQ__)
    " vpclmulqdq"
#    endif
#    if defined(__AVXVNNIINT8__)
    " avx_vnni_int8"
#    endif
#    if defined(__AVXVNNIINT16__)
    " avx_vnni_int16"
#    endif
#    if defined(__AVXIFMA__)
    " avx_ifma"
#    endif
#    if defined(__AVXNECONVERT__)
    " avx_ne_convert"
#    endif
#    if defined(__AVX512ER__)
    " avx512er"
#    endif
#    if defined(__AVX512IFMA__)
    " avx512ifma"
#    endif
#    if defined(__AVX512VBMI2__)
    " avx512_vbmi2"
#    endif
#    if defined(__AVX512BITALG__)
    " avx512_bitalg"
#    endif
#    if defined(__AVX512VPOPCNTDQ__)
    " avx512_vpopcntdq"
#    endif
#    if defined(__APX_F__)
    " apx_f"
#    endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#    if defined(__ARM_FEATURE_DOTPROD)
    " asimddp"
#    endif
#    if defined(__ARM_FEATURE_MATMUL_INT8)
    " i8mm"
#    endif
#    if defined(__ARM_FEATURE_BF16) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    " bf16"
#    endif
#    if defined(__ARM_FEATURE_SVE)
    " sve"
#    endif
#    if defined(__ARM_FEATURE_SVE2)
    " sve2"
#    endif
#    if defined(__ARM_FEATURE_SME)
    " sme"
#    endif
#    if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
    " asimdhp"
#    endif
#    if defined(__ARM_FEATURE_FP16_SCALAR_ARITHMETIC)
    " fphp"
#    endif
#    if defined(__ARM_FEATURE_ATOMICS)
    " atomics"
#    endif
#    if defined(__ARM_FEATURE_RCPC)
    " lrcpc"
#    endif
#    if defined(__ARM_FEATURE_QRDMX)
    " asimdrdm"
#    endif
#    if defined(__ARM_FEATURE_COMPLEX)
    " fcma"
#    endif
#    if defined(__ARM_FEATURE_JCVT)
    " jscvt"
#    endif
#    if defined(__ARM_FEATURE_FRINT)
    " frint"
#    endif
#    if defined(__ARM_FEATURE_FP16_FML)
    " asimdfhm"
#    endif
#    if defined(__ARM_FEATURE_MOPS)
    " mops"
#    endif
#endif
    ;
