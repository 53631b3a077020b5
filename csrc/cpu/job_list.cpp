#include "job_list.h"

#include <stdexcept>
#include <string>

namespace cast::cpu {

void refuse_job(const char* list, int most) {
  throw std::length_error(std::string(list) + " holds at most " + std::to_string(most) +
                          " jobs, and one more was added: raise the number where the list is declared");
}

}  // namespace cast::cpu
