// A model with ops of fastnlp_ops, run without Python: what export_tagger.py writes, .pt2 of AOTInductor or .pt of
// TorchScript. With P=$(python -c 'import torch; print(torch.__path__[0])'):
//   g++ -std=c++20 main.cpp -I$P/include -I$P/include/torch/csrc/api/include -L$P/lib -Wl,-rpath,$P/lib \
//     -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -o tagger
//   ./tagger $(python -c 'import fastnlp_ops; print(fastnlp_ops.library_path())') tagger.pt2 inputs.pt
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: tagger libfastnlp_cpu.so model.pt2|model.pt inputs.pt\n";
    return 2;
  }
  const std::string library = arguments[1], model = arguments[2];
  if (!dlopen(library.c_str(), RTLD_NOW)) {  // registers the ops
    std::cerr << dlerror() << "\n";
    return 1;
  }
  std::ifstream file(arguments[3], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue batch = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& input : batch.toListRef()) inputs.push_back(input.toTensor());
  const c10::InferenceMode guard;
  if (model.substr(model.rfind('.')) == ".pt2") {
    torch::inductor::AOTIModelPackageLoader loader(model);
    for (const at::Tensor& output : loader.run(inputs)) std::cout << output << "\n";
  } else {
    std::cout << torch::jit::load(model).forward({inputs.begin(), inputs.end()}) << "\n";
  }
}
