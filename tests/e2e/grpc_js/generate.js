// Calls a server with nothing but the .proto file: generate.js PROTO_ROOT ADDRESS REQUEST.
// Prints what comes, a JSON object a line; the last is the status.
"use strict";

const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const [root, address, request] = process.argv.slice(2);
const definition = loadSync("pippin/v1/inference.proto", {
  includeDirs: [root],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { Inference } = grpc.loadPackageDefinition(definition).pippin.v1;
const client = new Inference(address, grpc.credentials.createInsecure());

const say = (value) => console.log(JSON.stringify(value));
const stream = client.Generate(JSON.parse(request), { deadline: Date.now() + 30000 });
stream.on("data", say);
stream.on("error", () => {}); // the status says it
stream.on("status", (status) => {
  say({ code: grpc.status[status.code], details: status.details });
  client.close();
});
