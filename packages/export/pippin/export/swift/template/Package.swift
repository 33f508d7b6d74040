// swift-tools-version: 5.10
import PackageDescription

let tokenizers: Target.Dependency = .product(name: "Tokenizers", package: "swift-transformers")

let package = Package(
    name: "PippinModel",
    platforms: [.iOS("18.0"), .macOS("15.0")],
    products: [
        .library(name: "PippinModel", targets: ["PippinModel"]),
        .library(name: "PippinChat", targets: ["PippinChat"]),
        .executable(name: "pippin-generate", targets: ["pippin-generate"]),
    ],
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0")
    ],
    targets: [
        // The model itself needs nothing but Core ML.
        .target(name: "PippinModel"),
        .target(name: "PippinChat", dependencies: ["PippinModel", tokenizers]),
        .executableTarget(name: "pippin-generate", dependencies: ["PippinModel", "PippinChat", tokenizers]),
    ]
)
