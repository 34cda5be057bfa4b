// Filling and guarding device memory.
#include "device_data.h"

namespace swinq::testing {

namespace {

constexpr uint8_t kGuardByte = 0xa5, kPoisonByte = 0xff;

__device__ uint32_t hash(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>((x ^ x >> 31) >> 32);
}

template <typename T>
__global__ void fill_kernel(T* data, int64_t count, uint32_t seed, float low, float high) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += stride) {
        const float unit = hash(static_cast<uint64_t>(seed) << 32 ^ i) * 0x1p-32f;
        if constexpr (sizeof(T) == 1) {
            data[i] = static_cast<T>(fminf(floorf(low + unit * (high - low + 1)), high));
        } else {
            data[i] = static_cast<T>(low + unit * (high - low));
        }
    }
}

__global__ void set_kernel(float* data, int64_t count, uint32_t seed, int every, float value) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count && hash(static_cast<uint64_t>(seed) << 32 ^ i) % every == 0) data[i] = value;
}

__global__ void guard_kernel(uint8_t* buffer, int64_t bytes) {
    const int64_t all = bytes + 2 * GuardedBuffer::kGuard;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all;
         i += stride) {
        const bool inside = i >= GuardedBuffer::kGuard && i < GuardedBuffer::kGuard + bytes;
        buffer[i] = inside ? kPoisonByte : kGuardByte;
    }
}

__global__ void check_kernel(const uint8_t* buffer, int64_t bytes, Tally* tally) {
    const int i = threadIdx.x;
    if (buffer[i] != kGuardByte) atomicAdd(&tally->damaged, 1ull);
    if (buffer[GuardedBuffer::kGuard + bytes + i] != kGuardByte) atomicAdd(&tally->damaged, 1ull);
}

int grid_for(int64_t count) {
    const int64_t blocks = ceil_div(count, 256);
    return static_cast<int>(blocks < 1 ? 1 : blocks > 4096 ? 4096 : blocks);
}

}  // namespace

template <typename T>
void fill(T* data, int64_t count, uint32_t seed, float low, float high) {
    fill_kernel<<<grid_for(count), 256>>>(data, count, seed, low, high);
}

template void fill(int8_t*, int64_t, uint32_t, float, float);
template void fill(__half*, int64_t, uint32_t, float, float);
template void fill(float*, int64_t, uint32_t, float, float);

void set_some(float* data, int64_t count, uint32_t seed, int every, float value) {
    set_kernel<<<static_cast<int>(ceil_div(count, 256)), 256>>>(data, count, seed, every, value);
}

DeviceArray<uint8_t> random_bytes(Type type, int64_t count, uint32_t seed, float low, float high) {
    DeviceArray<uint8_t> bytes(count * size_of(type));
    if (type == Type::kInt8) {
        fill(reinterpret_cast<int8_t*>(bytes.get()), count, seed, low, high);
    } else if (type == Type::kHalf) {
        fill(reinterpret_cast<__half*>(bytes.get()), count, seed, low, high);
    } else {
        fill(reinterpret_cast<float*>(bytes.get()), count, seed, low, high);
    }
    return bytes;
}

void GuardedBuffer::poison(int64_t bytes) {
    if (bytes + 2 * kGuard > buffer_.size()) must(cudaErrorInvalidValue, "GuardedBuffer::poison");
    bytes_ = bytes;
    guard_kernel<<<grid_for(bytes / 4), 256>>>(buffer_.get(), bytes);
}

void GuardedBuffer::check_guards(Tally* tally) const {
    check_kernel<<<1, kGuard>>>(buffer_.get(), bytes_, tally);
}

}  // namespace swinq::testing
