// Calls a package that `lissom export MODEL model.pt2 --format pt2` wrote, without Python and without Lissom.
//
//     TORCH=$(python -c "import torch; print(torch.__path__[0])")
//     g++ -std=c++20 run_package.cpp -I$TORCH/include -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -o run_package
//     ./run_package model.pt2 2 9
//
// Every input is a tensor of ones in int64 of these sizes, as token ids and a mask may be.
#include <ATen/ops/mean.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <sstream>

int main(int count, char** words) {
  if (count < 3) {
    std::cerr << "usage: run_package model.pt2 SIZE...\n";
    return 2;
  }
  std::vector<int64_t> sizes;
  for (int index = 2; index < count; ++index) sizes.push_back(std::stoll(words[index]));
  try {
    torch::inductor::AOTIModelPackageLoader package(words[1]);
    std::istringstream names(package.get_metadata().at("inputs"));
    std::vector<at::Tensor> given;
    for (std::string name; names >> name;) given.push_back(at::ones(sizes, at::kLong));
    for (const at::Tensor& output : package.run(given))
      std::cout << output.sizes() << " " << output.to(at::kDouble).mean().item<double>() << "\n";
  } catch (const std::exception& error) {
    std::string message = error.what();
    std::cerr << words[1] << ": " << message.substr(0, message.find('\n')) << "\n";
    return 1;
  }
}
