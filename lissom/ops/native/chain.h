// Chains: calls of operators one after the other, without Python and PyTorch's dispatcher between them, which take several
// microseconds a call and so more than the computation where a model is small or reads one token.
//
// A chain is a list of instructions over registers of tensors. It is checked when it is made, and does not change afterwards,
// so that several threads may run it at once.
#pragma once

#include "boxed.h"
#include "checks.h"
#include "memory.h"

#include <map>
#include <mutex>
#include <unordered_map>

namespace lissom {
namespace {

enum class Kind : int64_t { kNone, kTensor, kConstant, kNumber, kInt, kBool, kFloat, kText, kInts };

struct Argument {
  Kind kind = Kind::kNone;
  int64_t value = 0;  // a register, the place of a constant or of a number that a run is given, or the integer itself
  double real = 0;
  std::string text{};
  std::vector<Argument> parts{};  // integers and numbers

  bool is_tensor() const { return kind == Kind::kTensor || kind == Kind::kConstant; }
  bool is_int() const { return kind == Kind::kInt || kind == Kind::kNumber; }
};

// What a run holds.
struct Registers {
  const std::vector<Tensor>& constants;
  const std::vector<int64_t>& numbers;
  std::vector<Tensor> tensors;

  const Tensor& tensor(const Argument& from) const {
    const Tensor& found = from.kind == Kind::kConstant ? constants[from.value] : tensors[from.value];
    TORCH_CHECK(found.defined(), "an instruction reads a register that holds no tensor");
    return found;
  }
  int64_t number(const Argument& from) const { return from.kind == Kind::kNumber ? numbers[from.value] : from.value; }
};

// How an argument becomes a parameter of the type T.
template <typename T>
struct Parameter;
template <>
struct Parameter<Tensor> {
  static bool fits(const Argument& from) { return from.is_tensor(); }
  static const Tensor& of(const Argument& from, const Registers& held) { return held.tensor(from); }
};
template <>
struct Parameter<int64_t> {
  static bool fits(const Argument& from) { return from.is_int(); }
  static int64_t of(const Argument& from, const Registers& held) { return held.number(from); }
};
template <typename T>
struct Parameter<std::optional<T>> {
  static bool fits(const Argument& from) { return from.kind == Kind::kNone || Parameter<T>::fits(from); }
  static std::optional<T> of(const Argument& from, const Registers& held) {
    return from.kind == Kind::kNone ? std::nullopt : std::optional<T>(Parameter<T>::of(from, held));
  }
};
template <>
struct Parameter<double> {
  static bool fits(const Argument& from) { return from.kind == Kind::kFloat || from.kind == Kind::kInt; }
  static double of(const Argument& from, const Registers&) { return from.kind == Kind::kInt ? from.value : from.real; }
};
template <>
struct Parameter<bool> {
  static bool fits(const Argument& from) { return from.kind == Kind::kBool; }
  static bool of(const Argument& from, const Registers&) { return from.value; }
};
template <>
struct Parameter<std::string_view> {
  static bool fits(const Argument& from) { return from.kind == Kind::kText; }
  static std::string_view of(const Argument& from, const Registers&) { return from.text; }
};
template <>
struct Parameter<at::IntArrayRef> {
  static bool fits(const Argument& from) { return from.kind == Kind::kInts; }
  static std::vector<int64_t> of(const Argument& from, const Registers& held) {
    std::vector<int64_t> found;
    for (const Argument& part : from.parts) found.push_back(held.number(part));
    return found;
  }
};

struct Instruction;

struct Kernel {
  bool (*fits)(const Instruction&);
  void (*run)(const Instruction&, Registers&);
};

struct Instruction {
  Kernel kernel;
  int64_t first = 0, results = 0;  // the registers of the results
  std::vector<Argument> arguments{};
  std::vector<int64_t> freed{};    // the registers that no later instruction reads
};

inline void keep(const Instruction& step, Registers& held, Tensor found) { held.tensors[step.first] = std::move(found); }
inline void keep(const Instruction& step, Registers& held, std::vector<Tensor> found) {
  TORCH_CHECK(static_cast<int64_t>(found.size()) == step.results, "an instruction has ", found.size(), " results instead of ",
              step.results);
  std::move(found.begin(), found.end(), held.tensors.begin() + step.first);
}

template <auto function>
struct KernelOf;
template <typename Result, typename... Parameters, Result (*function)(Parameters...)>
struct KernelOf<function> {
  static bool fits(const Instruction& step) {
    if (step.arguments.size() != sizeof...(Parameters) || (std::is_same_v<Result, Tensor> && step.results != 1)) return false;
    return [&]<size_t... n>(std::index_sequence<n...>) {
      return (Parameter<std::remove_cvref_t<Parameters>>::fits(step.arguments[n]) && ...);
    }(std::index_sequence_for<Parameters...>{});
  }
  static void run(const Instruction& step, Registers& held) {
    [&]<size_t... n>(std::index_sequence<n...>) {
      keep(step, held, function(Parameter<std::remove_cvref_t<Parameters>>::of(step.arguments[n], held)...));
    }(std::index_sequence_for<Parameters...>{});
  }
};

// The kernels by the operator's name.
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> found;
  return found;
}

template <auto function>
void add_kernel(const char* name) {
  kernels()[name] = {KernelOf<function>::fits, KernelOf<function>::run};
}

// Makes a function the CPU kernel of `lissom::name`, for PyTorch's dispatcher and for chains.
template <auto function, typename Library>
void implement(Library& library, const char* name) {
  library.impl(name, boxed<function>);
  add_kernel<function>((std::string("lissom::") + name).c_str());
}

std::vector<std::string> chain_operators() {
  std::vector<std::string> found;
  for (auto& [name, kernel] : kernels()) found.push_back(name);
  return found;
}

constexpr int64_t kMostRegisters = 1 << 24;

struct Chain {
  int64_t inputs = 0, numbers = 0, registers = 0;
  std::vector<Instruction> steps{};
  std::vector<Tensor> constants{};
  std::vector<int64_t> outputs{};  // registers
};

// Reads a chain from its numbers, and checks each of them.
class Reader {
 public:
  Reader(Chain& into, const std::vector<int64_t>& code, const std::vector<double>& floats, const std::vector<std::string>& texts)
      : into_(into), code_(code), floats_(floats), texts_(texts) {}

  void read(const std::vector<std::string>& operators) {
    while (place_ < code_.size()) {
      auto kernel = kernels().find(operators[below(operators.size())]);
      TORCH_CHECK(kernel != kernels().end(), "a chain calls an operator without a kernel");
      Instruction step{kernel->second};
      step.first = below(into_.registers + 1), step.results = below(into_.registers - step.first + 1);
      TORCH_CHECK(step.first >= into_.inputs, "an instruction writes to an input");
      for (int64_t count = next(); count > 0; --count) step.arguments.push_back(argument());
      for (int64_t count = next(); count > 0; --count) step.freed.push_back(below(into_.registers));
      TORCH_CHECK(step.kernel.fits(step), "the arguments of ", kernel->first, " do not fit its parameters");
      into_.steps.push_back(std::move(step));
    }
  }

 private:
  int64_t next() {
    TORCH_CHECK(place_ < code_.size(), "a chain ends within an instruction");
    return code_[place_++];
  }
  int64_t below(int64_t limit) {
    int64_t found = next();
    TORCH_CHECK(found >= 0 && found < limit, "a chain holds ", found, " where there are ", limit);
    return found;
  }
  Argument argument(bool whole = true) {
    Argument found{static_cast<Kind>(next())};
    switch (found.kind) {
      case Kind::kNone: return found;
      case Kind::kTensor: found.value = below(into_.registers); return found;
      case Kind::kConstant: found.value = below(into_.constants.size()); return found;
      case Kind::kNumber: found.value = below(into_.numbers); return found;
      case Kind::kInt: case Kind::kBool: found.value = next(); return found;
      case Kind::kFloat: found.real = floats_[below(floats_.size())]; return found;
      case Kind::kText: found.text = texts_[below(texts_.size())]; return found;
      case Kind::kInts:
        TORCH_CHECK(whole, "a list of integers holds a list");
        for (int64_t count = next(); count > 0; --count) {
          found.parts.push_back(argument(false));
          TORCH_CHECK(found.parts.back().is_int(), "a list of integers holds something else");
        }
        return found;
    }
    TORCH_CHECK(false, "a chain has an argument of an unknown kind");
  }

  Chain& into_;
  const std::vector<int64_t>& code_;
  const std::vector<double>& floats_;
  const std::vector<std::string>& texts_;
  size_t place_ = 0;
};

struct Chains {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Chain>> by_number;
  int64_t made = 0;
};

inline Chains& chains() {
  static Chains* found = new Chains;  // is never destroyed: a chain may be freed when the process ends
  return *found;
}

inline void free_chain(int64_t number) {
  std::shared_ptr<const Chain> freed;  // whose tensors are freed after the lock
  std::lock_guard lock(chains().mutex);
  if (auto found = chains().by_number.extract(number)) freed = std::move(found.mapped());
}

// Returns the chain's number as a tensor: the chain is freed with its memory, in whatever state PyTorch's dispatcher then is.
Tensor make_chain(const std::vector<std::string>& operators, const std::vector<int64_t>& code, const std::vector<double>& floats,
                  const std::vector<std::string>& texts, const std::vector<Tensor>& constants, int64_t inputs, int64_t numbers,
                  int64_t registers, const std::vector<int64_t>& outputs) {
  auto made = std::make_shared<Chain>();
  TORCH_CHECK(inputs >= 0 && numbers >= 0 && registers >= inputs && registers < kMostRegisters, "a chain has ", registers,
              " registers for ", inputs, " inputs");
  made->inputs = inputs, made->numbers = numbers, made->registers = registers, made->constants = constants, made->outputs = outputs;
  for (int64_t output : outputs) TORCH_CHECK(output >= 0 && output < registers, "a chain has no register ", output);
  Reader(*made, code, floats, texts).read(operators);
  auto release = [](void* block, size_t) {
    free_chain(*static_cast<int64_t*>(block));
    std::free(block);
  };
  auto* number = static_cast<int64_t*>(aligned_memory(sizeof(int64_t)));
  *number = 0;
  Tensor found(number, sizeof(int64_t), release, std::vector<int64_t>{}, at::kLong);
  std::lock_guard lock(chains().mutex);
  *number = ++chains().made;
  chains().by_number[*number] = std::move(made);
  return found;
}

std::vector<Tensor> run_chain(const Tensor& number, const std::vector<Tensor>& inputs, const std::vector<int64_t>& numbers) {
  check_exact(number, {}, at::kLong, "a chain");
  std::shared_ptr<const Chain> chain;
  {
    std::lock_guard lock(chains().mutex);
    auto found = chains().by_number.find(*number.const_data_ptr<int64_t>());
    TORCH_CHECK(found != chains().by_number.end(), "there is no chain of this number");
    chain = found->second;
  }
  TORCH_CHECK(static_cast<int64_t>(inputs.size()) == chain->inputs && static_cast<int64_t>(numbers.size()) == chain->numbers,
              "a chain takes ", chain->inputs, " tensors and ", chain->numbers, " numbers, not ", inputs.size(), " and ",
              numbers.size());
  for (const Tensor& constant : chain->constants)
    TORCH_CHECK(constant.is_current(), "the memory of a weight was moved or resized after the model was compiled; compile it again");
  struct Inside {
    Inside() { ++running(); }
    ~Inside() { --running(); }
  } inside;
  Registers held{chain->constants, numbers, inputs};
  held.tensors.resize(chain->registers);
  for (const Instruction& step : chain->steps) {
    step.kernel.run(step, held);
    for (int64_t place : step.freed) held.tensors[place] = Tensor();
  }
  std::vector<Tensor> found;
  for (int64_t output : chain->outputs) {
    TORCH_CHECK(held.tensors[output].defined(), "a chain returns a register that holds no tensor");
    found.push_back(held.tensors[output]);
  }
  return found;
}

}  // namespace
}  // namespace lissom
