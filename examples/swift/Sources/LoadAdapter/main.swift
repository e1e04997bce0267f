// Loads an adapter that mlx_dora trained into its base model, and answers a question
// with and without it.
//
// NOT COMPILED HERE: the machines that test mlx_dora have no Swift. The calls are those
// of mlx-swift-lm 3.31; the adapter's folder is checked against its rules in
// tests/adapters/test_swift.py. On a Mac with Xcode:
//
//     mlx_dora.demo                                   # trains mlx_dora_demo/adapter
//     cd examples/swift
//     xcodebuild -scheme LoadAdapter -destination 'platform=macOS' build
//     LoadAdapter MODEL_FOLDER ../../mlx_dora_demo/adapter "What does Python's 'len' do?"
//
// MODEL_FOLDER is the base that the adapter records, under "base" in its
// adapter_config.json: a local folder in MLX's format.

import Foundation
import HuggingFace
import MLX
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

enum Failure: Error, CustomStringConvertible {
    case usage
    case notRelative(String)
    case notLoaded(String)

    var description: String {
        switch self {
        case .usage:
            "usage: LoadAdapter MODEL_FOLDER ADAPTER_FOLDER QUESTION"
        case .notRelative(let key):
            "the key \(key) is a full path, which mlx-swift-lm does not match; write the "
                + "adapter again: mlx_dora.convert OLD NEW --to mlx --model MODEL"
        case .notLoaded(let reason):
            "the adapter does not fit the model: \(reason)"
        }
    }
}

/// The parts of `adapter_config.json` that decide whether Swift can load the adapter.
struct Settings: Decodable {
    struct Parameters: Decodable {
        let rank: Int
        let scale: Float
        let keys: [String]?
    }

    let fineTuneType: String
    let numLayers: Int
    let loraParameters: Parameters

    enum CodingKeys: String, CodingKey {
        case fineTuneType = "fine_tune_type"
        case numLayers = "num_layers"
        case loraParameters = "lora_parameters"
    }

    static func read(_ folder: URL) throws -> Settings {
        let data = try Data(contentsOf: folder.appending(component: "adapter_config.json"))
        return try JSONDecoder().decode(Settings.self, from: data)
    }

    /// Keys must be relative to a block, and `num_layers` positive: a negative number
    /// would stop the program in `Array.suffix`.
    func check() throws {
        for key in loraParameters.keys ?? [] where key.contains(".layers.") {
            throw Failure.notRelative(key)
        }
        guard numLayers > 0 else {
            throw Failure.notLoaded("num_layers is \(numLayers)")
        }
    }
}

/// Returns an answer of at most 80 tokens, always the likeliest token.
func answer(_ question: String, by model: ModelContainer) async throws -> String {
    let parameters = GenerateParameters(maxTokens: 80, temperature: 0)
    let session = ChatSession(model, generateParameters: parameters)
    return try await session.respond(to: question)
}

func run() async throws {
    let arguments = Array(CommandLine.arguments.dropFirst())
    guard arguments.count == 3 else { throw Failure.usage }
    let modelFolder = URL(filePath: arguments[0])
    let adapterFolder = URL(filePath: arguments[1])

    let settings = try Settings.read(adapterFolder)
    try settings.check()
    print(
        "\(settings.fineTuneType) of rank \(settings.loraParameters.rank) on the last "
            + "\(settings.numLayers) blocks")

    let model = try await loadModelContainer(
        from: modelFolder, using: #huggingFaceTokenizerLoader())
    print("without: \(try await answer(arguments[2], by: model))")

    // Replaces the linear layers that the keys name by DoRALinear (QDoRALinear on a
    // quantized base) and fills in every tensor of the file; one without a place is an
    // error.
    let adapter = try LoRAContainer.from(directory: adapterFolder)
    try await model.perform { context in
        do {
            try adapter.load(into: context.model)
        } catch {
            throw Failure.notLoaded("\(error)")
        }
        eval(context.model)
    }
    print("with:    \(try await answer(arguments[2], by: model))")

    // Several adapters beside one base: unload one, load the next.
    await model.perform { context in
        adapter.unload(from: context.model)
    }
    print("without: \(try await answer(arguments[2], by: model))")
}

do {
    try await run()
} catch {
    FileHandle.standardError.write(Data("Error: \(error)\n".utf8))
    exit(1)
}
