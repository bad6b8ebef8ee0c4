// cublaslt.cpp: the part of cuBLASLt that a trainer uses, in plain loops: D = epilogue(alpha op(A) op(B) + beta C),
// batched, in fp32 or with bf16 or fp16 matrices, always adding up in fp32. An attribute, epilogue or type that is not
// known here ends the program and is named: the stand-in must never do something else than the library would. It does
// not know which combinations the library refuses, nor the order in which the library adds.
//
// The workspace is poisoned by every matmul, so that two streams that share one are found.
#include "emu.h"

#if __has_include(<cublasLt.h>)  // it comes with cuBLAS, not with the runtime's headers
#include <cublasLt.h>
#include <vector>

namespace {
using emu::fail;
#define PC ((uintptr_t)__builtin_return_address(0))
#define CALLER (emu::source(PC).c_str())

struct Layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t leading, stride = 0;
    int32_t batch = 1;
    bool row_major = false;
    size_t at(uint64_t row, uint64_t column) const {
        return (size_t)(row_major ? row * (uint64_t)leading + column : column * (uint64_t)leading + row);
    }
    size_t size() const { return rows && columns ? at(rows - 1, columns - 1) + 1 : 0; }
};
struct Description {
    cublasComputeType_t compute;
    cublasOperation_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr;
    cudaDataType bias_type;
    bool has_bias_type = false;
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C and D
};

size_t bytes_of(cudaDataType type) {
    if (type == CUDA_R_32F) return 4;
    if (type == CUDA_R_16BF || type == CUDA_R_16F) return 2;
    fail("cublasLt: data type %d is not emulated (CUDA_R_32F, CUDA_R_16BF and CUDA_R_16F are)", (int)type);
}
float get(cudaDataType type, const void *p, size_t i) {
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    if (type == CUDA_R_16BF) return (float)((const __nv_bfloat16 *)p)[i];
    return (float)((const __half *)p)[i];
}
void set(cudaDataType type, void *p, size_t i, float value) {
    if (type == CUDA_R_32F)
        ((float *)p)[i] = value;
    else if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16(value);
    else
        ((__half *)p)[i] = __float2half(value);
}

struct Problem {
    Description how;
    Layout a, b, c, d;
    const void *A, *B, *C;
    void *D;
    float alpha, beta;
    uintptr_t pc;
    uint64_t depth() const { return how.transpose_a == CUBLAS_OP_N ? a.columns : a.rows; }
};

void touch_matrix(const Layout &layout, const void *p, int64_t offset, emu::Access access, uintptr_t pc) {
    uint64_t lines = layout.row_major ? layout.rows : layout.columns,
             length = layout.row_major ? layout.columns : layout.rows;
    size_t bytes = bytes_of(layout.type);
    for (uint64_t i = 0; i < lines; i++) {
        emu::touch((const char *)p + ((size_t)offset + i * (size_t)layout.leading) * bytes, length * bytes, access, pc);
    }
}

// One matrix of the batch; A, B, C and D point to it.
void multiply(const Problem &p) {
    uint64_t rows = p.d.rows, columns = p.d.columns, depth = p.depth();
    bool tf32 = p.how.compute == CUBLAS_COMPUTE_32F_FAST_TF32 && p.a.type == CUDA_R_32F;
    std::vector<float> a(rows * depth), b(columns * depth);
    auto number = [&](const Layout &layout, const void *data, size_t i) {
        float x = get(layout.type, data, i);
        return tf32 ? __uint_as_float(to_tf32(x)) : x;
    };
    for (uint64_t k = 0; k < depth; k++) {
        for (uint64_t i = 0; i < rows; i++)
            a[i * depth + k] = number(p.a, p.A, p.how.transpose_a == CUBLAS_OP_N ? p.a.at(i, k) : p.a.at(k, i));
        for (uint64_t j = 0; j < columns; j++)
            b[j * depth + k] = number(p.b, p.B, p.how.transpose_b == CUBLAS_OP_N ? p.b.at(k, j) : p.b.at(j, k));
    }
    cublasLtEpilogue_t e = p.how.epilogue;
    bool relu = e == CUBLASLT_EPILOGUE_RELU || e == CUBLASLT_EPILOGUE_RELU_BIAS;
    bool bias = e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_RELU_BIAS;
    cudaDataType bias_type = p.how.has_bias_type ? p.how.bias_type : p.d.type;
    for (uint64_t j = 0; j < columns; j++) {
        for (uint64_t i = 0; i < rows; i++) {
            float sum = 0;
            for (uint64_t k = 0; k < depth; k++) sum += a[i * depth + k] * b[j * depth + k];
            sum *= p.alpha;
            if (p.beta != 0) sum += p.beta * get(p.c.type, p.C, p.c.at(i, j));
            if (bias) sum += get(bias_type, p.how.bias, i);
            if (relu) sum = fmaxf(sum, 0);
            set(p.d.type, p.D, p.d.at(i, j), sum);
        }
    }
    // The gradient of a bias: sums of op(A)'s rows, or of op(B)'s columns, over the depth.
    if (e == CUBLASLT_EPILOGUE_BGRADA || e == CUBLASLT_EPILOGUE_BGRADB) {
        const std::vector<float> &of = e == CUBLASLT_EPILOGUE_BGRADA ? a : b;
        for (size_t i = 0; i < of.size() / depth; i++) {
            float sum = 0;
            for (uint64_t k = 0; k < depth; k++) sum += of[i * depth + k];
            set(bias_type, p.how.bias, i, sum);
        }
    }
}

void run(Problem p, void *workspace, size_t workspace_bytes) {
    emu::touch(workspace, workspace_bytes, emu::kWrite, p.pc);
    if (workspace_bytes) memset(workspace, 0xFF, workspace_bytes);
    cublasLtEpilogue_t e = p.how.epilogue;
    bool gradient = e == CUBLASLT_EPILOGUE_BGRADA || e == CUBLASLT_EPILOGUE_BGRADB;
    if (e != CUBLASLT_EPILOGUE_DEFAULT && e != CUBLASLT_EPILOGUE_RELU) {
        size_t bytes = (e == CUBLASLT_EPILOGUE_BGRADB ? p.d.columns : p.d.rows) *
                       bytes_of(p.how.has_bias_type ? p.how.bias_type : p.d.type);
        emu::require_memory(p.how.bias, bytes, p.pc);
        emu::touch(p.how.bias, bytes, gradient ? emu::kWrite : emu::kRead, p.pc);
    }
    struct {
        const Layout *layout;
        const void *p;
        emu::Access access;
    } uses[] = {{&p.a, p.A, emu::kRead},
                {&p.b, p.B, emu::kRead},
                {&p.c, p.beta != 0 ? p.C : nullptr, emu::kRead},
                {&p.d, p.D, emu::kWrite}};
    for (int n = 0; n < p.d.batch; n++) {
        const void *at[4];
        for (int i = 0; i < 4; i++) {
            const Layout &layout = *uses[i].layout;
            at[i] = uses[i].p;
            if (!uses[i].p) continue;
            emu::require_memory((const char *)uses[i].p + (size_t)(n * layout.stride) * bytes_of(layout.type),
                                layout.size() * bytes_of(layout.type), p.pc);
            touch_matrix(layout, uses[i].p, n * layout.stride, uses[i].access, p.pc);
            at[i] = (const char *)uses[i].p + (size_t)(n * layout.stride) * bytes_of(layout.type);
        }
        Problem one = p;
        one.A = at[0], one.B = at[1], one.C = at[2], one.D = (void *)at[3];
        multiply(one);
    }
}

template <class T>
T value(const void *p, size_t bytes, uintptr_t pc) {
    if (bytes != sizeof(T))
        fail("cublasLt: an attribute of %zu bytes where %zu belong, at %s", bytes, sizeof(T), emu::source(pc).c_str());
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}
}  // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    return *handle = (cublasLtHandle_t) new int, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return delete (int *)handle, CUBLAS_STATUS_SUCCESS; }
const char *cublasLtGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? "success" : "failure";
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *how, cublasComputeType_t compute, cudaDataType_t scale) {
    if ((compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_FAST_TF32) || scale != CUDA_R_32F) {
        fail(
            "cublasLt: compute type %d with scale type %d is not emulated (CUBLAS_COMPUTE_32F and _32F_FAST_TF32 with "
            "CUDA_R_32F are), at %s",
            (int)compute, (int)scale, CALLER);
    }
    Description *d = new Description;
    d->compute = compute;
    return *how = (cublasLtMatmulDesc_t)d, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t how) {
    return delete (Description *)how, CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t how, cublasLtMatmulDescAttributes_t name,
                                              const void *p, size_t bytes) {
    Description &d = *(Description *)how;
    switch (name) {
        case CUBLASLT_MATMUL_DESC_TRANSA:
        case CUBLASLT_MATMUL_DESC_TRANSB: {
            auto v = (cublasOperation_t)value<int32_t>(p, bytes, PC);
            if (v != CUBLAS_OP_N && v != CUBLAS_OP_T)
                fail("cublasLt: operation %d is not emulated (N and T are), at %s", (int)v, CALLER);
            (name == CUBLASLT_MATMUL_DESC_TRANSA ? d.transpose_a : d.transpose_b) = v;
            break;
        }
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            d.epilogue = value<cublasLtEpilogue_t>(p, bytes, PC);
            switch ((int)d.epilogue) {
                case CUBLASLT_EPILOGUE_DEFAULT:
                case CUBLASLT_EPILOGUE_RELU:
                case CUBLASLT_EPILOGUE_BIAS:
                case CUBLASLT_EPILOGUE_RELU_BIAS:
                case CUBLASLT_EPILOGUE_BGRADA:
                case CUBLASLT_EPILOGUE_BGRADB:
                    break;
                default:
                    fail(
                        "cublasLt: epilogue %d is not emulated (DEFAULT, RELU, BIAS, RELU_BIAS, BGRADA and BGRADB "
                        "are), at %s",
                        (int)d.epilogue, CALLER);
            }
            break;
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            d.bias = value<void *>(p, bytes, PC);
            break;
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            d.bias_type = (cudaDataType)value<int32_t>(p, bytes, PC);
            d.has_bias_type = bytes_of(d.bias_type) != 0;
            break;
        default:
            fail(
                "cublasLt: attribute %d of a matmul is not emulated (TRANSA, TRANSB, EPILOGUE, BIAS_POINTER and "
                "BIAS_DATA_TYPE are), at %s",
                (int)name, CALLER);
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading) {
    Layout *l = new Layout;
    l->type = type;
    l->rows = rows;
    l->columns = columns;
    l->leading = leading;
    bytes_of(type);
    return *layout = (cublasLtMatrixLayout_t)l, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return delete (Layout *)layout, CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t name,
                                                const void *p, size_t bytes) {
    Layout &l = *(Layout *)layout;
    switch (name) {
        case CUBLASLT_MATRIX_LAYOUT_ROWS:
            l.rows = value<uint64_t>(p, bytes, PC);
            break;
        case CUBLASLT_MATRIX_LAYOUT_COLS:
            l.columns = value<uint64_t>(p, bytes, PC);
            break;
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
            l.batch = value<int32_t>(p, bytes, PC);
            break;
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            l.stride = value<int64_t>(p, bytes, PC);
            break;
        case CUBLASLT_MATRIX_LAYOUT_LD:
            l.leading = value<int64_t>(p, bytes, PC);
            break;
        case CUBLASLT_MATRIX_LAYOUT_ORDER: {
            int32_t order = value<int32_t>(p, bytes, PC);
            if (order != CUBLASLT_ORDER_COL && order != CUBLASLT_ORDER_ROW)
                fail("cublasLt: order %d is not emulated (COL and ROW are), at %s", order, CALLER);
            l.row_major = order == CUBLASLT_ORDER_ROW;
            break;
        }
        default:
            fail(
                "cublasLt: attribute %d of a layout is not emulated (ROWS, COLS, ORDER, LD, BATCH_COUNT and "
                "STRIDED_BATCH_OFFSET are), at %s",
                (int)name, CALLER);
    }
    return CUBLAS_STATUS_SUCCESS;
}

// The preference is part of the algorithm, so that the product can be held to what was promised.
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    return *preference = (cublasLtMatmulPreference_t) new Preference, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return delete (Preference *)preference, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t name, const void *p,
                                                    size_t bytes) {
    Preference &wish = *(Preference *)preference;
    switch (name) {
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            wish.workspace = value<uint64_t>(p, bytes, PC);
            break;
        case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
            value<uint32_t>(p, bytes, PC);  // no sum is split here
            break;
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
            wish.alignment[name - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES] = value<uint32_t>(p, bytes, PC);
            break;
        default:
            fail(
                "cublasLt: attribute %d of a preference is not emulated (MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK "
                "and MIN_ALIGNMENT_A_BYTES to _D_ are), at %s",
                (int)name, CALLER);
    }
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found) {
    *found = wanted > 0;
    if (*found) {
        results[0] = cublasLtMatmulHeuristicResult_t();
        results[0].state = CUBLAS_STATUS_SUCCESS;
        results[0].workspaceSize = ((Preference *)preference)->workspace;  // all, so that too small a one is found
        static_assert(sizeof(Preference) <= sizeof results[0].algo.data, "");
        memcpy(results[0].algo.data, (Preference *)preference, sizeof(Preference));
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t how, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t a_layout, const void *B, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *C, cublasLtMatrixLayout_t c_layout, void *D,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
    Problem p = {*(Description *)how,
                 *(Layout *)a_layout,
                 *(Layout *)b_layout,
                 *(Layout *)c_layout,
                 *(Layout *)d_layout,
                 A,
                 B,
                 C,
                 D,
                 *(const float *)alpha,
                 *(const float *)beta,
                 (uintptr_t)__builtin_return_address(0)};
    bool na = p.how.transpose_a == CUBLAS_OP_N, nb = p.how.transpose_b == CUBLAS_OP_N;
    uint64_t m = na ? p.a.rows : p.a.columns, k = p.depth(), kb = nb ? p.b.rows : p.b.columns,
             n = nb ? p.b.columns : p.b.rows;
    if (p.d.rows != m || p.d.columns != n || k != kb || p.c.rows != m || p.c.columns != n) {
        fail("cublasLt: op(A) %lux%lu, op(B) %lux%lu, C %lux%lu, D %lux%lu do not fit, at %s", m, k, kb, n, p.c.rows,
             p.c.columns, p.d.rows, p.d.columns, CALLER);
    }
    if (p.a.type != p.b.type) fail("cublasLt: A and B of different types, at %s", CALLER);
    Preference promised;
    if (algo) memcpy((void *)&promised, algo->data, sizeof promised);
    if (algo && promised.workspace > workspace_bytes)
        fail("cublasLt: a workspace of %zu bytes where the algorithm has %lu, at %s", workspace_bytes,
             promised.workspace, CALLER);
    const void *const matrices[] = {A, B, C, D};
    for (int i = 0; algo && i < 4; i++)
        if ((uintptr_t)matrices[i] % promised.alignment[i] != 0)
            fail("cublasLt: matrix %c is not aligned to the %u bytes that the algorithm was chosen for, at %s",
                 "ABCD"[i], promised.alignment[i], CALLER);
    for (const Layout *l : {&p.a, &p.b, &p.c, &p.d}) {
        if (l->leading < (int64_t)(l->row_major ? l->columns : l->rows))
            fail("cublasLt: leading dimension %ld of a %lux%lu matrix, at %s", (long)l->leading, l->rows, l->columns,
                 CALLER);
        if (l->batch != p.d.batch) fail("cublasLt: batches of %d and %d, at %s", l->batch, p.d.batch, CALLER);
    }
    if (p.how.epilogue != CUBLASLT_EPILOGUE_DEFAULT && p.how.epilogue != CUBLASLT_EPILOGUE_RELU && !p.how.bias)
        fail("cublasLt: epilogue without a bias pointer, at %s", CALLER);
    if (p.d.batch > 1 && p.how.epilogue != CUBLASLT_EPILOGUE_DEFAULT && p.how.epilogue != CUBLASLT_EPILOGUE_RELU) {
        fail("cublasLt: a batch with a bias is not emulated, at %s", CALLER);
    }
    emu::launches++;
    emu::enqueue(stream, p.pc, [=] { run(p, workspace, workspace_bytes); });
    return CUBLAS_STATUS_SUCCESS;
}
#endif
