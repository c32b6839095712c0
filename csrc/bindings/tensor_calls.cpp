#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/call_site.h"
#include "bindings/short_call.h"
#include "bindings/tensor_reader.h"
#include "core/error.h"
#include "group/group.h"

namespace pycomm {
namespace {

namespace py = pybind11;

/// A parameter behind the tensors.
enum class Parameter { kNone, kOp, kRoot, kDst, kSrc, kTag, kGroup };
constexpr std::array kParameters = {Parameter::kOp,  Parameter::kRoot, Parameter::kDst,
                                    Parameter::kSrc, Parameter::kTag,  Parameter::kGroup};

constexpr const char* name_of(Parameter parameter) {
  switch (parameter) {
    case Parameter::kNone:
      return "";
    case Parameter::kOp:
      return "op";
    case Parameter::kRoot:
      return "root";
    case Parameter::kDst:
      return "dst";
    case Parameter::kSrc:
      return "src";
    case Parameter::kTag:
      return "tag";
    case Parameter::kGroup:
      return "group";
  }
  return "unknown parameter";
}

enum class Form {
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllGatherInto,
  kReduceScatterInto,
  kAllToAllInto,
  kSend,
  kRecv,
};

/// The public function of this form: its tensors, then what else it takes by position. Other
/// parameters than these, `tag` and `group` mean the long way.
struct Description {
  std::string_view name;
  int tensors;
  std::array<Parameter, 2> parameters;
};

constexpr std::array<Description, 8> kForms = {{
    {"all_reduce_", 1, {Parameter::kOp}},
    {"broadcast_", 1, {Parameter::kRoot}},
    {"reduce_", 1, {Parameter::kRoot, Parameter::kOp}},
    {"all_gather_into", 2, {}},
    {"reduce_scatter_into", 2, {Parameter::kOp}},
    {"all_to_all_into", 2, {}},
    {"send", 1, {Parameter::kDst}},
    {"recv", 1, {Parameter::kSrc}},
}};

/// The public functions on tensors that need no preparation, in one call from Python to the core.
///
/// A call returns no object, having done nothing, unless all about it is ordinary. It then goes the
/// long way, in Python, which knows every case and raises every error. Both ways announce the same
/// operation, so it does not matter which one a peer takes.
class TensorCalls {
 public:
  explicit TensorCalls(TensorReader reader) : reader_(std::move(reader)) {
    constexpr std::array kNames = {"SUM", "AVG", "MIN", "MAX", "PROD", "BAND", "BOR", "BXOR"};
    const py::object ops = py::type::of(py::cast(ReduceOp::kSum));
    for (std::size_t i = 0; i < kNames.size(); ++i) ops_[i] = ops.attr(kNames[i]);
    for (std::size_t i = 0; i < kParameters.size(); ++i) {
      names_[i] =
          py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name_of(kParameters[i])));
    }
  }

  /// The group that a call without one means; null: this process is no rank.
  void set_world(std::shared_ptr<Group> world) { world_ = std::move(world); }

  /// A call of the public function of this form.
  py::object call(Form form, const CallArguments& arguments) const {
    Call call;
    // A copy: while this call waits, another thread may shut down.
    call.group = world_;
    if (!parse(form, arguments, call) || !call.group) return {};
    if (form == Form::kSend || form == Form::kRecv) return transfer(form, call);
    return collective(form, call);
  }

  /// All-reduce `input` into `output`, which may be the same tensor.
  bool all_reduce(Group& group, py::handle input, py::handle output, py::handle op) const {
    Operation operation;
    operation.kind = Kind::kAllReduce;
    const auto source = reader_.read(input);
    if (!source || !find_op(op, operation.op) || !can_reduce(source->dtype, operation.op)) {
      return false;
    }
    const auto target = output.is(input) ? source : reader_.read(output);
    if (!target || target->dtype != source->dtype || !same(target->dims, source->dims)) {
      return false;
    }
    set_memory(operation, *source, source->data, target->data, source->count);
    run(group, std::move(operation), output);
    return true;
  }

 private:
  struct Call {
    std::array<py::handle, 2> tensors;
    ReduceOp op = ReduceOp::kSum;
    int root = 0;
    std::optional<int> peer;
    int tag = 0;
    std::shared_ptr<Group> group;
  };
  using Dims = std::span<const std::int64_t>;

  static bool same(Dims a, Dims b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

  /// Whether `whole` has p times the rows of `part`.
  static bool divides(Dims part, Dims whole, int p) {
    return !part.empty() && part.size() == whole.size() && whole[0] == p * part[0] &&
           same(part.subspan(1), whole.subspan(1));
  }

  /// Whether `part` lies elsewhere than `whole`, or in the place of block `rank` of it.
  static bool fits(const OrdinaryTensor& part, const OrdinaryTensor& whole, int rank) {
    return !part.overlaps(whole) ||
           part.data == whole.data + static_cast<std::size_t>(rank) * part.bytes();
  }

  bool find_op(py::handle op, ReduceOp& found) const {
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      if (!ops_[i].is(op)) continue;
      found = static_cast<ReduceOp>(i);
      return true;
    }
    return false;
  }

  /// A plain int that is not negative.
  static std::optional<int> number(PyObject* value) {
    if (!PyLong_CheckExact(value)) return std::nullopt;
    int overflow = 0;
    const long found = PyLong_AsLongAndOverflow(value, &overflow);
    if (overflow != 0 || found < 0 || found > INT32_MAX) return std::nullopt;
    return static_cast<int>(found);
  }

  bool set(Call& call, Parameter parameter, PyObject* value) const {
    switch (parameter) {
      case Parameter::kOp:
        return find_op(value, call.op);
      case Parameter::kGroup: {
        if (value == Py_None) return true;
        py::detail::make_caster<std::shared_ptr<Group>> group;
        if (!group.load(value, /*convert=*/false)) return false;
        call.group = py::detail::cast_op<std::shared_ptr<Group>&>(group);
        return true;
      }
      case Parameter::kNone:
        return false;
      default: {
        const auto found = number(value);
        if (!found) return false;
        if (parameter == Parameter::kRoot) call.root = *found;
        if (parameter == Parameter::kTag) call.tag = *found;
        if (parameter == Parameter::kDst || parameter == Parameter::kSrc) call.peer = *found;
        return true;
      }
    }
  }

  bool parse(Form form, const CallArguments& arguments, Call& call) const {
    const Description& description = kForms[static_cast<std::size_t>(form)];
    const auto& [name, tensors, parameters] = description;
    const Py_ssize_t most = tensors + static_cast<Py_ssize_t>(parameters.size());
    if (arguments.positional < tensors || arguments.positional > most) return false;
    for (Py_ssize_t i = 0; i < arguments.positional; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (i < tensors) {
        call.tensors[at] = arguments.values[i];
      } else if (!set(call, parameters[at - static_cast<std::size_t>(tensors)],
                      arguments.values[i])) {
        return false;
      }
    }
    for (Py_ssize_t i = 0; i < arguments.keyword_count(); ++i) {
      const Parameter parameter = named(PyTuple_GET_ITEM(arguments.keywords, i));
      const bool of_all = parameter == Parameter::kGroup;
      const bool of_messages = parameter == Parameter::kTag && form >= Form::kSend;
      const auto place = std::find(parameters.begin(), parameters.end(), parameter);
      // One that was given by position as well is an error, and those are made elsewhere.
      const bool of_form = place != parameters.end() &&
                           tensors + (place - parameters.begin()) >= arguments.positional;
      if (!of_all && !of_messages && !of_form) return false;
      if (!set(call, parameter, arguments.values[arguments.positional + i])) return false;
    }
    return true;
  }

  /// Keywords in source code are interned: one that is not is not known here.
  Parameter named(PyObject* name) const {
    for (std::size_t i = 0; i < names_.size(); ++i) {
      if (names_[i].ptr() == name) return kParameters[i];
    }
    return Parameter::kNone;
  }

  static void set_memory(Operation& operation, const OrdinaryTensor& announced,
                         const std::byte* input, std::byte* output, std::size_t count) {
    operation.dtype = announced.dtype;
    operation.shape = announced.shape();
    operation.input = input;
    operation.output = output;
    operation.count = count;
  }

  py::object collective(Form form, const Call& call) const {
    Operation operation;
    const auto first = reader_.read(call.tensors[0]);
    if (!first) return {};
    const bool in_place = kForms[static_cast<std::size_t>(form)].tensors == 1;
    const auto second = in_place ? first : reader_.read(call.tensors[1]);
    if (!second || first->dtype != second->dtype) return {};
    const OrdinaryTensor& output = *first;
    const OrdinaryTensor& input = *second;
    const Group& group = *call.group;
    const int p = group.size();
    operation.op = call.op;
    switch (form) {
      case Form::kAllReduce:
        operation.kind = Kind::kAllReduce;
        set_memory(operation, input, input.data, output.data, input.count);
        break;
      case Form::kBroadcast:
        operation.kind = Kind::kBroadcast;
        set_memory(operation, input, input.data, output.data, input.count);
        break;
      case Form::kReduce:
        operation.kind = Kind::kReduce;
        set_memory(operation, input, input.data, group.rank() == call.root ? output.data : nullptr,
                   input.count);
        break;
      case Form::kAllGatherInto: {
        operation.kind = Kind::kAllGather;
        const bool stacks =
            !output.dims.empty() && output.dims[0] == p && same(output.dims.subspan(1), input.dims);
        if (!stacks && !divides(input.dims, output.dims, p)) return {};
        if (!fits(input, output, group.rank())) return {};
        set_memory(operation, input, input.data, output.data, input.count);
        break;
      }
      case Form::kReduceScatterInto:
        operation.kind = Kind::kReduceScatter;
        if (!divides(output.dims, input.dims, p)) return {};
        if (!fits(output, input, group.rank())) return {};
        set_memory(operation, input, input.data, output.data, output.count);
        break;
      case Form::kAllToAllInto:
        operation.kind = Kind::kAllToAll;
        if (input.dims.empty() || input.dims[0] % p != 0) return {};
        if (!same(input.dims, output.dims) || input.overlaps(output)) return {};
        set_memory(operation, input, input.data, output.data,
                   input.count / static_cast<std::size_t>(p));
        break;
      case Form::kSend:
      case Form::kRecv:
        return {};  // messages: see transfer()
    }
    if (call.root >= p || (reduces(operation.kind) && !can_reduce(input.dtype, call.op))) return {};
    operation.root = call.root;
    const bool writes = operation.output != nullptr;
    run(*call.group, std::move(operation), writes ? call.tensors[0] : py::handle());
    return py::none();
  }

  py::object transfer(Form form, const Call& call) const {
    const auto tensor = reader_.read(call.tensors[0]);
    if (!tensor || !call.peer || *call.peer >= call.group->size()) return {};
    Transfer transfer;
    const bool receives = form == Form::kRecv;
    transfer.direction = receives ? Transfer::Direction::kReceive : Transfer::Direction::kSend;
    transfer.peer = *call.peer;
    transfer.tag = call.tag;
    transfer.dtype = tensor->dtype;
    transfer.count = tensor->count;
    transfer.shape = tensor->shape();
    transfer.memory = tensor->data;
    transfer.site = call_site();
    std::optional<py::gil_scoped_release> no_gil;
    const int source = call.group->post_office().run(transfer, /*timeout_s=*/0, interrupt_check(),
                                                     [&no_gil] { no_gil.emplace(); });
    no_gil.reset();
    if (!receives) return py::none();
    reader_.note_change(call.tensors[0]);
    return py::int_(source);
  }

  /// The lock is kept while the operation may end at once: giving it back and taking it again costs
  /// as much as a cache line's way.
  void run(Group& group, Operation operation, py::handle written) const {
    operation.site = call_site();
    std::optional<py::gil_scoped_release> no_gil;
    group.run(std::move(operation), interrupt_check(), [&no_gil] { no_gil.emplace(); });
    no_gil.reset();
    if (written) reader_.note_change(written);
  }

  const TensorReader reader_;
  std::array<py::object, 8> ops_;                     // by ReduceOp
  std::array<py::object, kParameters.size()> names_;  // interned, as kParameters
  std::shared_ptr<Group> world_;                      // under Python's lock
};

Form form_named(const std::string& name) {
  for (std::size_t i = 0; i < kForms.size(); ++i) {
    if (kForms[i].name == name) return static_cast<Form>(i);
  }
  throw InvalidArgumentError("tensor_calls: no short way is known for a function named " + name +
                             ".");
}

}  // namespace

void bind_tensor_calls(py::module_& module) {
  module.def(
      "tensor_calls",
      [](const py::type& tensor_type, py::object is_neg, py::object increment_version) {
        const auto calls = std::make_shared<TensorCalls>(
            TensorReader(tensor_type, std::move(is_neg), std::move(increment_version)));
        py::cpp_function all_reduce(
            [calls](py::handle group, py::handle input, py::handle output, py::handle op) {
              py::detail::make_caster<Group> known;
              return known.load(group, /*convert=*/false) &&
                     calls->all_reduce(known, input, output, op);
            });
        py::cpp_function shortened([calls, types = ShortCalls()](py::object function) {
          const Form form = form_named(py::str(function.attr("__name__")));
          const auto short_way = [calls, form](const CallArguments& arguments) {
            return calls->call(form, arguments);
          };
          return types.make(short_way, std::move(function));
        });
        py::cpp_function set_world(
            [calls](std::shared_ptr<Group> world) { calls->set_world(std::move(world)); });
        return py::make_tuple(std::move(all_reduce), std::move(shortened), std::move(set_world));
      },
      py::arg("tensor_type"), py::arg("is_neg"), py::arg("increment_version"),
      "Three functions: all_reduce(group, input, output, op) does in one call what ordinary "
      "tensors need, and returns False, having done nothing, for all others; shortened(function) "
      "puts such a short way before the public function of that name; set_world(group) says which "
      "group a call without one means.");
}

}  // namespace pycomm
