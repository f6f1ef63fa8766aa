//! The apiserver, and what it says: requests with a deadline, errors in the store's words. The client is made when it
//! is first needed and again after a refusal, since kubeconfigs and certificates come late and are renewed on disk.

use std::error::Error as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::{AsyncReadExt as _, Stream};
use http::Request;
use kube::client::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::core::params::{GetParams, ListParams, Patch, PatchParams, PostParams, WatchParams};
use kube::core::{Request as Resource, WatchEvent};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use tokio::time::timeout;

use super::super::StoreError;
use super::config::{KubeConfig, NodeIdentity};
use super::node::{Node, NodeList};

/// For one answer; a page of a list of large Nodes is some megabytes.
pub(super) const DEADLINE: Duration = Duration::from_secs(15);
/// Nodes in a page of a list.
pub(super) const PAGE: u32 = 500;
/// After which the apiserver is to end a watch: a connection that died unnoticed does not outlive it.
pub(super) const WATCH_LENGTH: Duration = Duration::from_secs(290);
/// As audit logs and managed fields name us.
const MANAGER: &str = "weftd";
const NODES: &str = "/api/v1/nodes";
const WITHOUT_CREDENTIALS: &str = "--kube-api-url without --kubeconfig-file speaks without credentials, also in a pod: \
                                   leave it out to use the pod's service account, or give a kubeconfig";

#[derive(Debug)]
pub(super) struct Connection {
    pub location: String,
    config: KubeConfig,
    client: Mutex<Option<Kept>>,
}

struct Kept(Client);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Connection {
    pub(super) fn new(config: &KubeConfig) -> Self {
        Self { location: config.location(), config: config.clone(), client: Mutex::new(None) }
    }

    #[cfg(test)]
    pub(super) fn with_client(config: &KubeConfig, client: Client) -> Self {
        Self { client: Mutex::new(Some(Kept(client))), ..Self::new(config) }
    }

    pub(super) fn reset(&self) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) async fn node(&self, name: &str) -> Result<Option<Node>, StoreError> {
        let request = Resource::new(NODES).get(name, &GetParams::default());
        self.found(self.ask(request).await)
    }

    /// The Node's conditions as they are: all of a Node, once.
    pub(super) async fn whole_node(&self, name: &str) -> Result<Option<Value>, StoreError> {
        let request = Resource::new(NODES).get(name, &GetParams::default());
        self.found(self.ask(request).await)
    }

    pub(super) async fn nodes(&self, limit: u32, token: Option<&str>) -> Result<NodeList, kube::Error> {
        let params = ListParams { limit: Some(limit), ..ListParams::default() };
        let params = match token {
            Some(token) => params.continue_token(token),
            None => params,
        };
        self.ask(Resource::new(NODES).list(&params)).await
    }

    /// The first object of a kind by its metadata alone, in a list which says how many there are. `None`: there is no
    /// such kind.
    pub(super) async fn first_of<T: DeserializeOwned>(&self, kind: &str) -> Result<Option<T>, StoreError> {
        let params = ListParams { limit: Some(1), ..ListParams::default() };
        let request = Resource::new(kind).list_metadata(&params);
        self.found(self.ask(request).await)
    }

    /// Makes an object, unless one of its name is there.
    pub(super) async fn create(&self, kind: &str, object: &Value) -> Result<(), StoreError> {
        let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
        let request = Resource::new(kind).create(&params, object.to_string().into_bytes());
        match self.ask::<IgnoredAny>(request).await {
            Ok(IgnoredAny) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(self.error(&error)),
        }
    }

    /// The Node that the pod runs on, which is us.
    pub(super) async fn node_of_pod(&self, namespace: &str, pod: &str) -> Result<Option<String>, StoreError> {
        let pods = format!("/api/v1/namespaces/{namespace}/pods");
        let request = Resource::new(pods).get(pod, &GetParams::default());
        let pod: Option<Value> = self.found(self.ask(request).await)?;
        Ok(pod.and_then(|pod| pod.pointer("/spec/nodeName")?.as_str().map(str::to_owned)))
    }

    /// A patch of `nodes/<name>/status`, all that RBAC has to allow. `None`: there is no such Node.
    pub(super) async fn patch_status(
        &self,
        name: &str,
        patch: &Patch<Value>,
    ) -> Result<Option<Node>, StoreError> {
        let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let request = Resource::new(NODES).patch_subresource("status", name, &params, patch);
        self.found(self.ask(request).await)
    }

    /// Every change of a Node after `version`.
    pub(super) async fn watch_nodes(
        &self,
        version: &str,
    ) -> Result<impl Stream<Item = Result<WatchEvent<Node>, kube::Error>> + Send + use<>, kube::Error> {
        let length = u32::try_from(WATCH_LENGTH.as_secs()).ok();
        let params = WatchParams { timeout: length, bookmarks: true, ..WatchParams::default() };
        let request = Resource::new(NODES).watch(&params, version).map_err(kube::Error::BuildRequest)?;
        let client = self.client().await?;
        let opened = timeout(DEADLINE, client.request_events::<Node>(request)).await;
        opened.unwrap_or_else(|_| Err(silent(DEADLINE)))
    }

    pub(super) fn error(&self, error: &kube::Error) -> StoreError {
        let location = self.location.clone();
        match error {
            kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
                // What we were let in by may have been renewed meanwhile.
                if status.code == 401 {
                    self.reset();
                }
                let bare = self.config.speaks_without_credentials();
                let cause = if bare { format!("; {WITHOUT_CREDENTIALS}") } else { String::new() };
                StoreError::Refused { location, reason: format!("{}{cause}", status.message) }
            }
            kube::Error::Api(status) => StoreError::Unavailable {
                location,
                reason: format!("{} {}: {}", status.code, status.reason, status.message),
            },
            kube::Error::InferKubeconfig(_) | kube::Error::InferConfig(_) | kube::Error::Auth(_) => {
                StoreError::Refused { location, reason: causes(error) }
            }
            other => StoreError::Unavailable { location, reason: causes(other) },
        }
    }

    pub(super) fn identity(&self) -> &NodeIdentity {
        &self.config.node
    }

    /// Status 404 is an answer.
    fn found<T>(&self, answer: Result<T, kube::Error>) -> Result<Option<T>, StoreError> {
        match answer {
            Ok(found) => Ok(Some(found)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(self.error(&error)),
        }
    }

    /// One request and its answer.
    async fn ask<T: DeserializeOwned>(
        &self,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, kube::Error> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        let client = self.client().await?;
        let answered = timeout(DEADLINE, async {
            let mut body = Vec::new();
            let mut stream = Box::pin(client.request_stream(request).await?);
            stream.read_to_end(&mut body).await.map_err(kube::Error::ReadEvents)?;
            serde_json::from_slice(&body).map_err(kube::Error::SerdeError)
        });
        answered.await.unwrap_or_else(|_| Err(silent(DEADLINE)))
    }

    async fn client(&self) -> Result<Client, kube::Error> {
        let kept = |client: &Mutex<Option<Kept>>| {
            client.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|Kept(client)| client.clone())
        };
        if let Some(client) = kept(&self.client) {
            return Ok(client);
        }
        let mut config = self.read_config().await?;
        config.default_retry = false;
        config.connect_timeout = Some(DEADLINE / 3);
        let client = Client::try_from(config)?;
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(Kept(client.clone()));
        Ok(client)
    }

    /// As client-go's BuildConfigFromFlags: what is given, and a URL alone is given without credentials; else the pod's
    /// service account. Else, which flanneld does not, what kubectl would take.
    async fn read_config(&self) -> Result<Config, kube::Error> {
        let url = |url: &String| url.parse::<http::Uri>().map_err(|e| kube::Error::HttpError(e.into()));
        let KubeConfig { kubeconfig, api_url, .. } = &self.config;
        let options = KubeConfigOptions::default();
        let mut config = match kubeconfig {
            Some(file) => Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &options).await?,
            None => match api_url {
                Some(given) => return Ok(Config::new(url(given)?)),
                None if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() => Config::incluster()
                    .map_err(|e| kube::Error::Service(format!("the pod's service account: {e}").into()))?,
                None => Config::from_kubeconfig(&options).await?,
            },
        };
        if let Some(given) = api_url {
            config.cluster_url = url(given)?;
        }
        Ok(config)
    }
}

/// An error with everything that lies behind it: hyper's own text says nothing.
pub(super) fn causes(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

fn silent(deadline: Duration) -> kube::Error {
    kube::Error::Service(format!("no answer within {} s", deadline.as_secs()).into())
}
