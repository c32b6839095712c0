#include "core/record.h"

#include <algorithm>

namespace pycomm {

std::string Record::describe() const {
  if (what == What::kCollective) return signature.describe();
  const bool sends = what == What::kSend;
  return std::string(sends ? "send" : "recv") + " of " + signature.elements() +
         (sends ? " to " : " from ") + (peer < 0 ? "any rank" : "rank " + std::to_string(peer)) +
         ", tag " + std::to_string(tag);
}

std::string Record::describe_group() const {
  return {group_name.begin(), std::find(group_name.begin(), group_name.end(), '\0')};
}

}  // namespace pycomm
