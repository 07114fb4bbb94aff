//! Admin calls: to every worker, with a result for each, behind their gate.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use mock_worker::{MockWorker, Reply};
use proxied::{FakeRuntime, Proxied, Setup, good_decode, good_prefill};
use reqwest::Method;
use serde_json::{Value, json};

async fn agreeing() -> MockWorker {
    MockWorker::start(|_, _| Reply::Json(200, r#"{"status":"done"}"#.to_owned())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_to_every_worker_as_they_are() {
    let workers = [agreeing().await, agreeing().await, agreeing().await];
    let proxy = Proxied::between(&[&workers[0]], &[&workers[1], &workers[2]]).await;
    for (path, body) in [
        ("/update_weights", r#"{"weight_dir":"/w/step_3"}"#),
        ("/reload_weights", "{}"),
        ("/load_lora_adapter", r#"{"lora_name":"a","lora_path":"/a"}"#),
        ("/v1/load_lora_adapter", r#"{"lora_name":"a","lora_path":"/a"}"#),
        ("/pause?mode=wait&clear_cache=true", ""),
        ("/resume", ""),
    ] {
        let answer = proxy.send(Method::POST, path, &[("authorization", "Bearer key")], body.to_owned()).await;
        let told = answer.json();
        assert_eq!((answer.status, &told["status"]), (200, &json!("ok")), "{path}: {told}");
        let results = told["results"].as_array().expect("a list");
        for (worker, result) in workers.iter().zip(results) {
            let seen = worker.seen();
            let last = seen.last().expect("was asked");
            assert_eq!((last.path.as_str(), last.text().as_str()), (path, body));
            assert_eq!(last.header("authorization"), Some("Bearer key"));
            assert_eq!(result["worker"], worker.url());
            assert_eq!((&result["status"], &result["body"]), (&json!(200), &json!({"status": "done"})));
        }
        assert_eq!(
            results.iter().map(|result| result["role"].as_str().unwrap()).collect::<Vec<_>>(),
            ["prefill", "decode", "decode"]
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broadcaster_gets_a_place_for_every_worker() {
    let workers = [agreeing().await, agreeing().await, agreeing().await];
    let mut setup = Setup::new(&[&workers[0]], &[&workers[1], &workers[2]]);
    setup.prefill[0].tp = 4;
    setup.decode[0].tp = 2;
    let proxy = setup.start().await;
    let body = json!({"host": "10.0.0.9", "port": 29501, "server_rank": 0, "num_inference_server": 1, "timeout": 1200});
    assert_eq!(proxy.post("/init_broadcaster", body.to_string()).await.json()["status"], "ok");
    let sent: Vec<Value> = workers.iter().map(|worker| worker.seen()[0].json()).collect();
    let field = |name: &str| sent.iter().map(|body| body[name].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(field("server_rank"), [0, 1, 2]);
    assert_eq!(field("num_inference_server"), [3, 3, 3]);
    assert_eq!(field("rank_offset"), [0, 4, 6]);
    assert_eq!(field("inference_world_size"), [7, 7, 7]);
    assert!(sent.iter().all(|body| body["host"] == "10.0.0.9" && body["timeout"] == 1200));
    let refused = proxy.post("/init_broadcaster", "[]").await;
    assert_eq!(refused.status, 400);
    refused.error();
}

/// Servers of vLLM itself, which know none of PRIME-RL's paths.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_reach_vllm_by_its_own_route_and_its_broadcast_is_refused_with_what_to_do() {
    let vllm = || {
        MockWorker::start(|asked, _| match asked.path.as_str() {
            "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" => Reply::Json(200, "{}".to_owned()),
            _ => Reply::Json(404, "{}".to_owned()),
        })
    };
    let workers = [vllm().await, vllm().await];
    let proxy = Proxied::between(&[&workers[0]], &[&workers[1]]).await;
    let body = json!({"lora_name": "a", "lora_path": "/a"}).to_string();
    assert_eq!(proxy.post("/load_lora_adapter", body.clone()).await.status, 200);
    assert_eq!(proxy.post("/unload_lora_adapter", body).await.status, 200);
    for worker in &workers {
        let seen = worker.seen();
        let paths: Vec<_> = seen.iter().map(|asked| asked.path.as_str()).collect();
        let both = ["/load_lora_adapter", "/v1/load_lora_adapter", "/unload_lora_adapter", "/v1/unload_lora_adapter"];
        assert_eq!(paths, both);
        let want = json!({"lora_name": "a", "lora_path": "/a", "load_inplace": true});
        assert_eq!(seen[1].json(), want, "a name that is there gets the new files");
    }
    let refused = proxy.post("/init_broadcaster", r#"{"host": "10.0.0.9", "port": 29501}"#).await;
    assert_eq!(refused.status, 501);
    let why = refused.error();
    assert!(why.contains("weight_broadcast.type = \"filesystem\"") && why.contains("weights.vllm_workers"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_out_of_step_is_told_apart_from_a_call_nobody_knows() {
    let good = agreeing().await;
    let bad = MockWorker::start(|_, _| Reply::Json(500, r#"{"error":"disk"}"#.to_owned())).await;
    let proxy = Proxied::between(&[&good], &[&bad]).await;
    let answer = proxy.post("/update_weights", "{}").await;
    assert_eq!(answer.status, 502);
    assert!(answer.error().contains("1 of 2 workers"));
    let told = answer.json();
    assert_eq!((&told["status"], &told["results"][1]["body"]["error"]), (&json!("error"), &json!("disk")));

    let unknown = [
        MockWorker::start(|_, _| Reply::Json(404, "{}".to_owned())).await,
        MockWorker::start(|_, _| Reply::Json(404, "{}".to_owned())).await,
    ];
    let proxy = Proxied::between(&[&unknown[0]], &[&unknown[1]]).await;
    assert_eq!(proxy.post("/update_weights", "{}").await.status, 404);

    let dying = MockWorker::start(|_, _| Reply::Close).await;
    let proxy = Proxied::between(&[&good], &[&dying]).await;
    let answer = proxy.post("/update_weights", "{}").await;
    assert_eq!(answer.status, 502);
    assert!(answer.json()["results"][1]["error"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_keeps_strangers_out_and_does_not_travel_on() {
    let (prefill, decode) = (agreeing().await, agreeing().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.admin_token = Some("sesame".to_owned());
    let proxy = setup.start().await;
    for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("authorization", "sesame")]] {
        for (method, path) in
            [(Method::POST, "/update_weights"), (Method::GET, "/admin/workers"), (Method::POST, "/init_broadcaster")]
        {
            let answer = proxy.send(method, path, headers, "{}".to_owned()).await;
            assert_eq!(answer.status, 401, "{path} {headers:?}");
            answer.error();
        }
    }
    assert!(prefill.seen().is_empty());
    let token = [("authorization", "Bearer sesame")];
    assert_eq!(proxy.send(Method::POST, "/update_weights", &token, "{}".to_owned()).await.status, 200);
    assert_eq!(prefill.seen()[0].header("authorization"), None);
    assert_eq!(proxy.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn admin_routes_can_have_a_port_of_their_own() {
    let (prefill, decode) = (agreeing().await, agreeing().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.admin_port = true;
    let proxy = setup.start().await;
    let answer = proxy.post("/update_weights", "{}").await;
    assert_eq!(answer.status, 404);
    answer.error();
    let admin = proxy.handle().admin_address().expect("apart");
    let answer = reqwest::Client::new().post(format!("http://{admin}/update_weights")).body("{}").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer = reqwest::Client::new().post(format!("http://{admin}/v1/completions")).body("{}").send().await.unwrap();
    assert_eq!(answer.status(), 404);
    assert_eq!(prefill.seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_and_transfers_are_shown() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let runtime = FakeRuntime::start(&pdlink::security::Secret::loopback()).await;
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.prefill[0].kv_addr = Some(runtime.address.clone());
    let proxy = setup.start().await;
    let answer = proxy.post("/v1/completions", r#"{"prompt":"a"}"#).await;
    let workers = proxy.get("/admin/workers").await.json();
    assert_eq!(workers["workers"][0]["url"], prefill.url());
    assert_eq!(workers["workers"][0]["kv_addr"], runtime.address.as_str());
    assert_eq!((&workers["workers"][1]["role"], &workers["workers"][1]["served"]), (&json!("decode"), &json!(1)));

    let id = answer.header("x-pdlink-transfer-id").expect("an id").to_owned();
    let shown = proxy.get(&format!("/admin/transfers/{id}")).await;
    assert_eq!((shown.status, &shown.json()["transfer_id"]), (404, &json!(id)));
    assert_eq!(shown.json()["errors"], json!([]));
    let bad = proxy.get("/admin/transfers/xyz").await;
    assert_eq!(bad.status, 400);
    bad.error();
}

#[tokio::test(flavor = "multi_thread")]
async fn health_speaks_for_roles_or_for_all() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.decode.push(pdlink::proxy::WorkerAddress::new(MockWorker::nobody()));
    let proxy = setup.start().await;
    assert_eq!(proxy.get("/health").await.status, 200);
    assert_eq!(proxy.get("/health?all=true").await.status, 503);
    proxy.handle().worker_went_down(&prefill.url());
    assert_eq!(proxy.get("/health").await.status, 503);
    assert!(proxy.handle().worker_came_up(&prefill.url()) && !proxy.handle().worker_came_up("http://other:1"));
    assert_eq!(proxy.get("/health").await.json()["status"], "ok");
    let page = proxy.get("/metrics").await;
    assert!(page.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(page.body.contains("pdlink_proxy_worker_up") && page.body.ends_with("# EOF\n"), "{}", page.body);
}
