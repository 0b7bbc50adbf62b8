/* TEMPLATE once for every kind of processor: for any, and for AVX2 where there may be one. */
#define NAME portable
#define TARGET
#define BYTES 16
#include TEMPLATE
#ifdef X86
#define NAME avx2
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#include TEMPLATE
#define PICK(function) (kernel ? function##_avx2 : function##_portable)
#else
#define PICK(function) ((void)kernel, function##_portable)
#endif
