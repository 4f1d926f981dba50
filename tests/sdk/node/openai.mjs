// The official `openai` package for Node against the server in HEADRACE_URL.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { ask, hello, key, model, url, Wheel } from "./common.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });

test("a chat, whole and streamed", async () => {
  const body = { model, messages: hello, temperature: 0, max_tokens: 24 };
  const whole = await client.chat.completions.create(body);
  let text = "";
  const stream = await client.chat.completions.create({
    ...body, stream: true, stream_options: { include_usage: true },
  });
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper puts a tool call together", async () => {
  const tools = [{ type: "function", function: weatherFunction }];
  const runner = client.chat.completions.stream({ model, messages: ask, tools, temperature: 0 });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  const call = final.choices[0].message.tool_calls[0];
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Rome" });
});

test("runTools goes through the whole loop", async () => {
  const seen = [];
  const runner = client.chat.completions.runTools({
    model, messages: ask, temperature: 0, stream: true,
    tools: [{
      type: "function",
      function: {
        ...weatherFunction,
        parse: JSON.parse,
        function: ({ city }) => { seen.push(city); return '{"temperature": 21, "sky": "sunny"}'; },
      },
    }],
  });
  assert.match(await runner.finalContent(), /21/);
  assert.deepEqual(seen, ["Rome"]);
});

test("parse with a zod schema", async () => {
  const response_format = zodResponseFormat(Wheel, "wheel");
  for (const seed of [1, 2]) {
    const answer = await client.chat.completions.parse({
      model, messages: hello, response_format, temperature: 1.2, seed, max_tokens: 400,
    });
    assert.ok(["overshot", "undershot"].includes(answer.choices[0].message.parsed.kind));
  }
});

test("responses: events, parse, a tool call", async () => {
  const stream = client.responses.stream({ model, input: hello, temperature: 0, max_output_tokens: 24 });
  let text = "";
  stream.on("response.output_text.delta", (event) => { text += event.delta; });
  const final = await stream.finalResponse();
  assert.equal(text, final.output_text);
  const parsed = await client.responses.parse({
    model, input: hello, text: { format: zodTextFormat(Wheel, "wheel") }, max_output_tokens: 400,
  });
  assert.ok(parsed.output_parsed.kind);
  const called = await client.responses.create({
    model, input: ask, temperature: 0, tools: [{ type: "function", ...weatherFunction }],
  });
  const call = called.output.find((item) => item.type === "function_call");
  assert.deepEqual(JSON.parse(call.arguments), { city: "Rome" });
});

test("errors have their classes", async () => {
  const long = [{ role: "user", content: "wheel ".repeat(20000) }];
  await assert.rejects(
    client.chat.completions.create({ model, messages: long }),
    (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
  );
  await assert.rejects(client.models.retrieve("other"), OpenAI.NotFoundError);
});

const weatherFunction = {
  name: "get_weather",
  description: "Get the current weather of a city",
  parameters: z.toJSONSchema(z.object({ city: z.string() })),
};
