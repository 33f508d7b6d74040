// swift-tools-version: 5.10
import PackageDescription

let package = Package(
    name: "PippinModel",
    platforms: [.iOS("18.0"), .macOS("15.0")],
    products: [
        .library(name: "PippinModel", targets: ["PippinModel"]),
        .executable(name: "pippin-generate", targets: ["pippin-generate"]),
    ],
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0")
    ],
    targets: [
        // The model itself needs nothing but Core ML.
        .target(name: "PippinModel"),
        .executableTarget(
            name: "pippin-generate",
            dependencies: [
                "PippinModel",
                .product(name: "Tokenizers", package: "swift-transformers"),
            ]
        ),
    ]
)
