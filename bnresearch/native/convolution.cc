// Convolutions by oneDNN, as custom calls of XLA: y = x * w and its two transposes, NHWC and HWIO.
//
// A batch is cut into parts along its first axis (parts.h); a part is one primitive of oneDNN with
// one thread. Weights are small: they are brought into oneDNN's blocked order once per call.
// Activations stay NHWC, for which oneDNN's kernels are as fast as for its own orders.

#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "parts.h"

namespace bnresearch {
namespace {

using Tag = dnnl::memory::format_tag;
using Desc = dnnl::memory::desc;
using Dims = dnnl::memory::dims;
constexpr auto kFloat = dnnl::memory::data_type::f32;

const dnnl::engine& Engine() {
  static const auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

// One thread of OpenMP while it lives, if that is what this oneDNN runs on. Looked up in the
// library itself: a process may hold several OpenMP runtimes (torch brings its own).
class OneThread {
 public:
  OneThread() {
    if (Runtime().set) {
      before_ = Runtime().get();
      Runtime().set(1);
    }
  }
  ~OneThread() {
    if (Runtime().set) Runtime().set(before_);
  }

 private:
  struct Functions {
    void (*set)(int) = nullptr;
    int (*get)() = nullptr;
  };
  static const Functions& Runtime() {
    static const Functions functions = [] {
      Functions found;
      Dl_info info;
      if (!dladdr(reinterpret_cast<void*>(&dnnl_version), &info)) return found;
      void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
      if (!library) return found;
      auto set = dlsym(library, "omp_set_num_threads");
      auto get = dlsym(library, "omp_get_max_threads");
      if (set && get) {
        found.set = reinterpret_cast<void (*)(int)>(set);
        found.get = reinterpret_cast<int (*)()>(get);
      }
      return found;
    }();
    return functions;
  }
  int before_ = 1;
};

// Memory of this thread, kept from call to call. Slots: what must not overlap.
enum Slot { kScratch, kWeights, kPartial, kSlots };

float* Keep(Slot slot, size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::array<std::unique_ptr<void, Free>, kSlots> kept;
  thread_local std::array<size_t, kSlots> sizes{};
  if (sizes[slot] < bytes) {
    size_t size = (bytes + 4095) / 4096 * 4096;
    kept[slot].reset();
    sizes[slot] = 0;
    kept[slot].reset(std::aligned_alloc(4096, size));
    if (!kept[slot]) throw std::bad_alloc();
    sizes[slot] = size;
  }
  return static_cast<float*>(kept[slot].get());
}

enum Kind { kForward, kData, kWeightsGradient };

struct Shape {
  int64_t n, h, w, ci, oh, ow, co, kh, kw, sh, sw, top, bottom, left, right;
  auto Key(Kind kind) const {
    return std::array<int64_t, 16>{kind, n,  h,  w,  ci,  oh,     ow,   co,
                                   kh,   kw, sh, sw, top, bottom, left, right};
  }
  double Work() const { return 1.0 * n * oh * ow * co * kh * kw * ci; }
};

// A primitive for one shape, and the order in which it wants its weights.
struct Prepared {
  dnnl::primitive primitive;
  Desc x, weights, y, scratch;
  size_t Scratch() const { return scratch.get_size(); }
};

Desc Plain(const Shape& s) { return Desc({s.co, s.ci, s.kh, s.kw}, kFloat, Tag::hwio); }

Prepared Make(Kind kind, const Shape& s) {
  OneThread one;
  constexpr auto direct = dnnl::algorithm::convolution_direct;
  Desc x({s.n, s.ci, s.h, s.w}, kFloat, Tag::nhwc);
  Desc y({s.n, s.co, s.oh, s.ow}, kFloat, Tag::nhwc);
  Desc any({s.co, s.ci, s.kh, s.kw}, kFloat, Tag::any);
  Dims strides{s.sh, s.sw}, before{s.top, s.left}, after{s.bottom, s.right};
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // what makes a primitive thread-safe
  dnnl::convolution_forward::primitive_desc forward(
      Engine(), dnnl::prop_kind::forward_training, direct, x, any, y, strides, before, after, attr);
  if (kind == kForward) {
    return {dnnl::convolution_forward(forward), x, forward.weights_desc(), y,
            forward.scratchpad_desc()};
  }
  if (kind == kData) {
    dnnl::convolution_backward_data::primitive_desc data(Engine(), direct, x, any, y, strides,
                                                         before, after, forward, attr);
    return {dnnl::convolution_backward_data(data), x, data.weights_desc(), y,
            data.scratchpad_desc()};
  }
  dnnl::convolution_backward_weights::primitive_desc gradient(Engine(), direct, x, any, y, strides,
                                                              before, after, forward, attr);
  return {dnnl::convolution_backward_weights(gradient), x, gradient.diff_weights_desc(), y,
          gradient.scratchpad_desc()};
}

// The one Prepared of a shape. Nothing is ever removed, so references stay good; a process meets
// few shapes.
const Prepared& Get(Kind kind, const Shape& shape) {
  static auto* mutex = new std::shared_mutex;
  static auto* known = new std::map<std::array<int64_t, 16>, Prepared>;
  auto key = shape.Key(kind);
  {
    std::shared_lock<std::shared_mutex> lock(*mutex);
    auto found = known->find(key);
    if (found != known->end()) return found->second;
  }
  Prepared made = Make(kind, shape);
  std::unique_lock<std::shared_mutex> lock(*mutex);
  return known->emplace(key, std::move(made)).first->second;
}

dnnl::memory At(const Desc& desc, const float* data) {
  return dnnl::memory(desc, Engine(), const_cast<float*>(data));
}

void Run(const Prepared& p, int x_name, const float* x, int weights_name, const float* weights,
         int y_name, const float* y) {
  OneThread one;
  dnnl::stream stream(Engine());
  p.primitive.execute(stream, {{x_name, At(p.x, x)},
                               {weights_name, At(p.weights, weights)},
                               {y_name, At(p.y, y)},
                               {DNNL_ARG_SCRATCHPAD, At(p.scratch, Keep(kScratch, p.Scratch()))}});
  stream.wait();
}

void Reorder(const Desc& from, const float* source, const Desc& to, float* target) {
  OneThread one;
  dnnl::stream stream(Engine());
  auto in = At(from, source), out = At(to, target);
  dnnl::reorder(in, out).execute(stream, in, out);
  stream.wait();
}

// A batch of `count` in `parts` parts as equal as can be: at most two sizes, so few primitives.
struct Cut {
  int64_t count, parts;
  int64_t Start(int64_t part) const {
    return part * (count / parts) + std::min(part, count % parts);
  }
  int64_t Size(int64_t part) const { return Start(part + 1) - Start(part); }
};

using Buffer = ffi::Buffer<ffi::F32, 4>;
using Result = ffi::Result<Buffer>;
using Numbers = ffi::Span<const int64_t>;

Shape MakeShape(ffi::Span<const int64_t> x, Numbers w, Numbers y, Numbers strides,
                Numbers padding) {
  return {x[0],       x[1],       x[2],       x[3],       y[1],       y[2],       y[3], w[0], w[1],
          strides[0], strides[1], padding[0], padding[1], padding[2], padding[3]};
}

Shape Part(Shape shape, int64_t n) {
  shape.n = n;
  return shape;
}

// Forward pass (kind kForward) and gradient of the data (kData): `in` of the one is `out` of the
// other, and all that differs is which of x and y is written.
void WithWeights(Kind kind, ffi::ThreadPool& pool, const Shape& shape, const float* x,
                 const float* weights, const float* y) {
  Cut cut{shape.n, PartsFor(pool, shape.n, shape.Work())};
  bool forward = kind == kForward;
  int64_t x_size = shape.h * shape.w * shape.ci, y_size = shape.oh * shape.ow * shape.co;
  AskForLargePages(forward ? y : x, shape.n * (forward ? y_size : x_size) * sizeof(float));
  std::map<int64_t, const Prepared*> sizes;
  for (int64_t part : {int64_t{0}, cut.parts - 1}) {
    sizes[cut.Size(part)] = &Get(kind, Part(shape, cut.Size(part)));
  }
  // Both sizes nearly always want the same order of the weights; where not, each gets its own.
  std::map<int64_t, const float*> ordered;
  std::vector<std::unique_ptr<char[]>> second;
  const Prepared* first = sizes.begin()->second;
  for (const auto& [size, prepared] : sizes) {
    if (prepared->weights == Plain(shape)) {
      ordered[size] = weights;
    } else if (prepared != first && prepared->weights == first->weights) {
      ordered[size] = ordered[sizes.begin()->first];
    } else {
      size_t bytes = prepared->weights.get_size();
      float* target;
      if (prepared == first) {
        target = Keep(kWeights, bytes);
      } else {
        second.emplace_back(new char[bytes + 64]);
        auto address = reinterpret_cast<uintptr_t>(second.back().get());
        target = reinterpret_cast<float*>((address + 63) / 64 * 64);
      }
      Reorder(Plain(shape), weights, prepared->weights, target);
      ordered[size] = target;
    }
  }
  InParts(pool, cut.parts, [&](int64_t part) {
    int64_t start = cut.Start(part), size = cut.Size(part);
    Run(*sizes.at(size), forward ? DNNL_ARG_SRC : DNNL_ARG_DIFF_SRC, x + start * x_size,
        DNNL_ARG_WEIGHTS, ordered.at(size), forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST,
        y + start * y_size);
  });
}

ffi::Error Forward(ffi::ThreadPool pool, Buffer x, Buffer w, Result y, Numbers strides,
                   Numbers padding) {
  return Guarded("oneDNN", [&] {
    Shape shape =
        MakeShape(x.dimensions(), w.dimensions(), y->dimensions(), strides, padding);
    WithWeights(kForward, pool, shape, x.typed_data(), w.typed_data(), y->typed_data());
  });
}

ffi::Error Data(ffi::ThreadPool pool, Buffer g, Buffer w, Result x, Numbers strides,
                Numbers padding) {
  return Guarded("oneDNN", [&] {
    Shape shape =
        MakeShape(x->dimensions(), w.dimensions(), g.dimensions(), strides, padding);
    WithWeights(kData, pool, shape, x->typed_data(), w.typed_data(), g.typed_data());
  });
}

// Every part has a sum of its own; they are added up in their order, so that the result does not
// depend on who computed what.
ffi::Error Weights(ffi::ThreadPool pool, Buffer x, Buffer g, Result w, Numbers strides,
                   Numbers padding) {
  return Guarded("oneDNN", [&] {
    constexpr int64_t kMost = 64 << 20;  // bytes of sums
    Shape shape =
        MakeShape(x.dimensions(), w->dimensions(), g.dimensions(), strides, padding);
    int64_t parts = PartsFor(pool, shape.n, shape.Work());
    int64_t fit = kMost / static_cast<int64_t>(w->size_bytes() + 1);
    parts = std::min(parts, std::max(std::min(parts, pool.num_threads()), fit));
    Cut cut{shape.n, parts};
    const Prepared& first = Get(kWeightsGradient, Part(shape, cut.Size(0)));
    size_t bytes = (first.weights.get_size() + 63) / 64 * 64, stride = bytes / sizeof(float);
    float* sums = Keep(kPartial, bytes * cut.parts);
    int64_t x_size = shape.h * shape.w * shape.ci, y_size = shape.oh * shape.ow * shape.co;
    InParts(pool, cut.parts, [&](int64_t part) {
      int64_t start = cut.Start(part);
      const Prepared& own = Get(kWeightsGradient, Part(shape, cut.Size(part)));
      const float *xs = x.typed_data() + start * x_size, *gs = g.typed_data() + start * y_size;
      float* sum = sums + part * stride;
      if (own.weights == first.weights) {
        Run(own, DNNL_ARG_SRC, xs, DNNL_ARG_DIFF_WEIGHTS, sum, DNNL_ARG_DIFF_DST, gs);
      } else {
        float* other = Keep(kWeights, own.weights.get_size());
        Run(own, DNNL_ARG_SRC, xs, DNNL_ARG_DIFF_WEIGHTS, other, DNNL_ARG_DIFF_DST, gs);
        Reorder(own.weights, other, first.weights, sum);
      }
    });
    for (int64_t part = 1; part < cut.parts; ++part) {
      const float* sum = sums + part * stride;
      for (size_t i = 0; i < stride; ++i) sums[i] += sum[i];
    }
    Reorder(first.weights, sums, Plain(shape), w->typed_data());
  });
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_forward, Forward,
                              Bind().Ret<Buffer>().Attr<Numbers>("strides").Attr<Numbers>(
                                  "padding"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_data, Data,
                              Bind().Ret<Buffer>().Attr<Numbers>("strides").Attr<Numbers>(
                                  "padding"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_weights, Weights,
                              Bind().Ret<Buffer>().Attr<Numbers>("strides").Attr<Numbers>(
                                  "padding"));

}  // namespace bnresearch

extern "C" const char* onednn_version() {
  static const std::string text = [] {
    const dnnl_version_t* v = dnnl_version();
    return std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
           std::to_string(v->patch);
  }();
  return text.c_str();
}
