#include "collectives/all_to_all.h"

#include "core/error.h"

namespace pycomm {

Task<> all_to_all(Context&, const Operation&) {
  throw CommError("all_to_all: not written yet");  // replaced in this very change
  co_return;
}

}  // namespace pycomm
